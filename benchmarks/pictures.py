"""An epoch over questions about pictures: TRL's SFTTrainer with PEFT, and `lorakit train`.

    python -m benchmarks.pictures [--pictures 960 --held-out 150]

The model and the pictures are those of `lorakit demo --images`: SmolLM2-135M behind a small vision
tower, and a question about the color, the shape or the digit of each picture. All sides have the
same rows, seed, batches and schedule; LoRA on the language model and the projector; the loss of the
answers alone.

- trl: SFTTrainer and PEFT with TRL's collator for pictures, with activation checkpointing, as it
  comes.
- trl_plain: without activation checkpointing, which is faster and larger.
- lorakit: batches of as many rows, in one line.

Time is Trainer's whole loop, with the reading of pictures. Accuracy is the share of exactly right
answers to other pictures, of each side's saved adapter by one function.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers import (
    FIELDS,
    clock_of,
    compare,
    one_epoch,
    trl_arguments,
    warmed,
    with_lorakit,
)
from benchmarks.turns import Figures, peak_memory_mb, take_turns

SIDES = ("trl", "trl_plain", "lorakit")
LINEAR = r".*(text_model\.layers\..*_proj|connector\.modality_projection\.proj)"


def measure(side: str, options: argparse.Namespace) -> Figures:
    """Trains one epoch in this process, on the model and the rows in `options.folder`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    training = one_epoch(options)
    clock = clock_of(transformers.Trainer)
    base, data = options.folder / "base", options.folder / "train.jsonl"
    with tempfile.TemporaryDirectory() as place:
        if side == "lorakit":
            lora = FIELDS | {"parts": ["language", "projector"]}
            with_lorakit(options, str(base), data, training, Path(place), lora=lora)
        else:
            training["gradient_checkpointing"] = side == "trl"
            _with_trl(base, data, options, training, Path(place))
        memory = peak_memory_mb()
        accuracy = _accuracy(Path(place, "run"), base, options)
    return {
        "samples_per_second": options.pictures / clock["seconds"],
        "memory_mb": memory,
        "accuracy": accuracy,
        "first_step": clock["first_step"],
        "steps": clock["steps"],
    }


def _with_trl(
    base: Path, data: Path, options: argparse.Namespace, training: dict[str, Any], folder: Path
) -> None:
    import datasets
    import peft
    import transformers
    import trl

    import lorakit

    model, _ = lorakit.load_model(str(base), options.dtype)
    transformers.set_seed(42)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    given = [
        {
            "images": [str(data.parent / row["image"])],
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]
    images = datasets.Sequence(datasets.Image())
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**trl_arguments(options, training, folder)),
        train_dataset=datasets.Dataset.from_list(given).cast_column("images", images),
        processing_class=transformers.AutoProcessor.from_pretrained(base),
        peft_config=peft.LoraConfig(**FIELDS | {"target_modules": LINEAR}, task_type="CAUSAL_LM"),
    )
    warmed(trainer).train()
    trainer.model.save_pretrained(folder / "run")


def _accuracy(adapter: Path, base: Path, options: argparse.Namespace) -> float:
    """The share of exactly right answers to the held-out pictures."""
    from lorakit.adapters.open import open_adapter
    from lorakit.data.dataset import load_samples
    from lorakit.evaluation.answers import answer_samples

    opened = open_adapter(adapter, base=str(base), dtype=options.dtype)
    samples = load_samples(options.folder / "held_out.jsonl")
    answers = answer_samples(
        opened.model, opened.tokenizer, samples, max_new_tokens=6, batch_size=50
    )
    right = [one.answer == s.reference for one, s in zip(answers, samples, strict=True)]
    return sum(right) / len(right)


def _prepare(folder: Path, options: argparse.Namespace) -> None:
    """Writes the model and the rows, once for all sides."""
    from lorakit.demo.picture_base import write_base
    from lorakit.demo.run import write_rows
    from lorakit.demo.shapes import write_questions

    write_base(folder / "base", options.seed)
    for name, count, seed in (("train", options.pictures, 1), ("held_out", options.held_out, 2)):
        rows = write_questions(folder / name, count, options.seed + seed)
        write_rows(folder / f"{name}.jsonl", rows)


def main() -> None:
    """Takes turns, prints a table, and last one line of JSON with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=960)
    parser.add_argument("--held-out", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("prepare", *SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "prepare":
        _prepare(options.folder, options)
        return
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    names = ("pictures", "held_out", "batch", "learning_rate", "dtype", "seed")
    case = [f"--{n.replace('_', '-')}={getattr(options, n)}" for n in names]
    with tempfile.TemporaryDirectory() as place:
        case.append(f"--folder={place}")
        # In a process of its own: the peak of the process that starts a side is counted as its own.
        command = [sys.executable, "-m", "benchmarks.pictures", "--side", "prepare", *case]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = take_turns("benchmarks.pictures", options.sides, case, options.rounds)
    title = f"{options.pictures} questions about pictures, {options.dtype}"
    columns = {"samples/s": "samples_per_second", "MB": "memory_mb", "accuracy": "accuracy"}
    compare(title, found, columns | {"steps": "steps"}, speed="samples_per_second")


if __name__ == "__main__":
    main()
