"""Classification on an encoder: does lorakit's training equal that of PEFT with Trainer?

The task is made of the E2E challenge's sentences: which `priceRange` (or another slot of the
table) does a sentence speak of? Both train LoRA (r=8, all-linear, the head whole) on the same rows
with the same settings and seed, then label the same held-out sentences. CPU seconds are of the
whole, loading included, and hold on a busy machine too. The order of rows and the first values of
`A` differ between the two, so compare several seeds; that the same values and batches give the same
adapter is a test (tests/training/test_tasks.py).

    python -m benchmarks.classify --data e2e_train.csv --valid e2e_valid.csv --rows 800
"""

import argparse
import csv
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import lorakit
from benchmarks.peers import warmed
from lorakit.adapters.open import OpenAdapter, open_adapter
from lorakit.data.labelled import collect_labels, read_labelled
from lorakit.evaluation.label_evaluation import evaluate_labels
from lorakit.models.names import resolve

MODEL = "all-minilm-l6-v2"
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def write_task(table: Path, slot: str, rows: int, path: Path) -> Path:
    """Sentences of `table` whose `mr` has `slot`, with its value as their label; a fixed draw."""
    with table.open(encoding="utf-8", newline="") as file:
        found = [
            {"text": row["ref"], "label": match[1]}
            for row in csv.DictReader(file)
            if (match := re.search(rf"{slot}\[(.*?)\]", row["mr"]))
        ]
    random.Random(0).shuffle(found)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in found[:rows]), encoding="utf-8")
    return path


def with_lorakit(train: Path, settings: dict[str, Any], folder: Path) -> tuple[float, int]:
    """Trains with `lorakit.train`; returns the seconds of training and the trained parameters."""
    recipe = {
        "model": MODEL,
        "dtype": "float32",
        "data": {"train": str(train), "eval": 0, "max_length": 128},
        "lora": {"task_type": "SEQ_CLS", **LORA},
        "training": settings,
        "output_dir": str(folder),
    }
    seconds = lorakit.train(recipe).manifest.train_seconds
    model = open_adapter(folder, base=MODEL, dtype="float32").model
    return seconds, sum(tensor.numel() for tensor in model.adapter_tensors("default").values())


def with_peft(train: Path, settings: dict[str, Any], folder: Path) -> tuple[float, int]:
    """Trains with PEFT and plain Trainer; returns what `with_lorakit` does."""
    place = resolve(MODEL).path
    samples = read_labelled(train, "SEQ_CLS")
    number_of = collect_labels(samples, []).number_of
    tokenizer = AutoTokenizer.from_pretrained(place)
    rows = [
        {
            **tokenizer(*sample.texts, truncation=True, max_length=128),
            "labels": number_of[str(sample.labels[0])],
        }
        for sample in samples
    ]
    set_seed(settings["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=len(number_of))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **LORA))
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), report_to="none", disable_tqdm=True, **settings
    )
    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    began = time.perf_counter()
    warmed(trainer).train()
    seconds = time.perf_counter() - began
    adapted.save_pretrained(folder)
    return seconds, adapted.get_nb_trainable_parameters()[0]


def opened_as(folder: Path, labels: tuple[str, ...]) -> OpenAdapter:
    """The adapter in `folder`, with the names of the labels, which PEFT's files do not have."""
    opened = open_adapter(folder, base=MODEL, dtype="float32")
    return OpenAdapter(**{**vars(opened), "labels": labels})


def main() -> None:
    """Runs both, prints the table, and last one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--slot", default="priceRange")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    settings = {
        "num_train_epochs": options.epochs,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "save_strategy": "no",
        "seed": options.seed,
    }
    torch.manual_seed(options.seed)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        train = write_task(options.data, options.slot, options.rows, Path(place) / "train.jsonl")
        valid = write_task(options.valid, options.slot, options.held_out, Path(place) / "v.jsonl")
        held = read_labelled(valid, "SEQ_CLS")
        labels = collect_labels(read_labelled(train, "SEQ_CLS"), held)
        for name, run in (("lorakit", with_lorakit), ("peft", with_peft)):
            folder = Path(place) / name
            began = time.process_time()
            seconds, parameters = run(train, settings, folder)
            spent = time.process_time() - began
            scores = evaluate_labels(opened_as(folder, labels.names), held).scores
            found[name] = {
                "accuracy": scores["accuracy"]["tuned"],
                "f1": scores["f1"]["tuned"],
                "loss": scores["loss"]["tuned"],
                "seconds": round(seconds, 1),
                "cpu_seconds": round(spent, 1),
                "parameters": parameters,
            }
            found["most frequent label"] = {k: scores[k]["base"] for k in ("accuracy", "f1")}
    what = f"{options.slot}: {len(labels.names)} labels, {options.rows} rows, seed {options.seed}"
    table = Table(title=what)
    for heading in ("", "accuracy", "macro F1", "loss", "seconds", "CPU seconds", "parameters"):
        table.add_column(heading, justify="right")
    keys = ("accuracy", "f1", "loss", "seconds", "cpu_seconds", "parameters")
    for name, numbers in found.items():
        cells = [numbers.get(key) for key in keys]
        table.add_row(name, *("" if cell is None else f"{cell:,.4g}" for cell in cells))
    Console().print(table)
    ratio = found["peft"]["cpu_seconds"] / found["lorakit"]["cpu_seconds"]
    print(json.dumps({"speed_ratio": round(ratio, 3), "found": found}))


if __name__ == "__main__":
    main()
