"""The E2E challenge: does lorakit's training equal that of PEFT with Trainer?

Both train the bundled model on the same tokenised rows (r=16, all-linear, learning rate 5e-4,
batch 16, one epoch, the same schedule and seed), then answer the same held-out tables. BLEU has
every table's own references.

    python -m benchmarks.e2e --train e2e_train.csv --valid e2e_valid.csv --rows 2000
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainingArguments, set_seed

import lorakit
from benchmarks.peers import warmed
from lorakit.adapters.open import open_adapter
from lorakit.data.batches import Collator
from lorakit.data.dataset import load_samples
from lorakit.data.masking import tokenize
from lorakit.evaluation.evaluate import Evaluation, evaluate

COLUMNS = {"prompt": "mr", "completion": "ref"}
MODEL = "smollm2-135m-instruct"
SETTINGS = {
    "num_train_epochs": 1,
    "learning_rate": 5e-4,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "save_strategy": "no",
    "seed": 42,
}


def with_lorakit(train: Path, rows: int, folder: Path) -> float:
    """Trains with `lorakit.train` into `folder`; returns the seconds of training."""
    recipe = {
        "model": MODEL,
        "data": {"train": str(train), "eval": 0, "limit": rows, "columns": COLUMNS},
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "training": SETTINGS,
        "output_dir": str(folder),
    }
    return lorakit.train(recipe).manifest.train_seconds


def with_peft(train: Path, rows: int, folder: Path) -> float:
    """Trains with PEFT and plain Trainer into `folder`; returns the seconds of training."""
    model, tokenizer = lorakit.load_model(MODEL)
    samples = load_samples(train, COLUMNS, rows)
    tokenized = [tokenize(sample, tokenizer, 1024) for sample in samples]
    set_seed(42)
    config = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        **SETTINGS,
    )
    collate = Collator(tokenizer.pad_token_id)
    trainer = Trainer(model=adapted, args=arguments, train_dataset=tokenized, data_collator=collate)
    began = time.perf_counter()
    warmed(trainer).train()
    seconds = time.perf_counter() - began
    adapted.save_pretrained(folder)
    return seconds


def scores(folder: Path, valid: Path) -> Evaluation:
    """BLEU and loss of the adapter in `folder`, and of the bare base."""
    opened = open_adapter(folder, base=MODEL)
    samples = load_samples(valid, COLUMNS)
    return evaluate(opened.model, opened.tokenizer, samples, metrics=["bleu", "rouge", "loss"])


def main() -> None:
    """Runs both, prints the table, and last one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2000)
    options = parser.parse_args()
    torch.manual_seed(42)
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for name, run in (("lorakit", with_lorakit), ("peft", with_peft)):
            folder = Path(place) / name
            seconds = run(options.train, options.rows, folder)
            found[name] = (seconds, scores(folder, options.valid))
    table = Table(title=f"E2E, {options.rows} rows, one epoch")
    for heading in ("", "seconds", "BLEU", "ROUGE-L", "loss"):
        table.add_column(heading, justify="right")
    first = next(iter(found.values()))[1].scores
    table.add_row("base", "", *(f"{score['base']:.3f}" for score in first.values()))
    for name, (seconds, result) in found.items():
        tuned = (f"{score['tuned']:.3f}" for score in result.scores.values())
        table.add_row(name, f"{seconds:.0f}", *tuned)
    Console().print(table)
    ratio = found["peft"][0] / found["lorakit"][0]
    figures = {name: (s, result.scores) for name, (s, result) in found.items()}
    print(json.dumps({"speed_ratio": round(ratio, 3), "found": figures}))


if __name__ == "__main__":
    main()
