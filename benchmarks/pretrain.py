"""Continued pretraining on plain text: TRL's SFTTrainer with packing, and `lorakit train`.

    python -m benchmarks.pretrain --data wiki_demo.txt [--documents 6 --held-out 2]

A line of the file is a document. All sides have the same documents, adapter, seed, schedule and
length of a block.

- trl: SFTTrainer and PEFT with `packing_strategy: wrapped`, which fills blocks of `--length` tokens
  and divides documents where a block ends, with activation checkpointing, as it comes. A document's
  tokens are read with the document before it in the block.
- trl_plain: without activation checkpointing, which is faster and larger.
- lorakit: `objective: pretrain` and `data.packing`: documents divided into windows, which do not
  see each other's document.

Tokens are those of the documents; time is Trainer's whole loop. The held-out loss is taken of each
side's saved adapter by one function.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers import (
    FIELDS,
    clock_of,
    one_epoch,
    parser_of,
    run,
    trl_arguments,
    warmed,
    with_lorakit,
)
from benchmarks.turns import Figures, peak_memory_mb


def measure(side: str, options: argparse.Namespace) -> Figures:
    """Trains one epoch in this process."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    lines = [line for line in options.data.read_text().splitlines() if line.strip()]
    documents = lines[: options.documents]
    training = one_epoch(options)
    clock = clock_of(transformers.Trainer)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        held_out = lines[options.documents :][: options.held_out]
        for name, part in (("train", documents), ("held", held_out)):
            rows = "".join(json.dumps({"text": text}) + "\n" for text in part)
            (folder / f"{name}.jsonl").write_text(rows)
        if side == "lorakit":
            more = {"data": {"packing": True, "max_length": options.length}}
            train = folder / "train.jsonl"
            with_lorakit(
                options, options.model, train, training, folder, objective="pretrain", **more
            )
        else:
            training["gradient_checkpointing"] = side == "trl"
            _with_trl(documents, options, training, folder)
        memory = peak_memory_mb()
        loss, tokens = _scores(folder, options)
    return {
        "tokens_per_second": tokens / clock["seconds"],
        "memory_mb": memory,
        "held_out_loss": loss,
        "tokens": tokens,
        "steps": clock["steps"],
    }


def _with_trl(
    documents: list[str], options: argparse.Namespace, training: dict[str, Any], folder: Path
) -> None:
    import datasets
    import peft
    import transformers
    import trl

    import lorakit

    model, tokenizer = lorakit.load_model(options.model, options.dtype)
    transformers.set_seed(42)
    config = trl.SFTConfig(
        **trl_arguments(options, training, folder),
        max_length=options.length,
        packing=True,
        packing_strategy="wrapped",
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in documents]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**FIELDS, task_type="CAUSAL_LM"),
    )
    warmed(trainer).train()
    trainer.model.save_pretrained(folder / "run")


def _scores(folder: Path, options: argparse.Namespace) -> tuple[float, int]:
    """The held-out loss in nats a token of the adapter in `folder`, and the documents' tokens."""
    from lorakit.adapters.open import open_adapter
    from lorakit.data.mixing import mix
    from lorakit.evaluation.held_out import held_out_scores, rows_of
    from lorakit.objectives.registry import make_objective

    objective = make_objective("pretrain")
    opened = open_adapter(folder / "run", base=options.model, dtype=options.dtype)

    def rows(name: str, length: int) -> list[Any]:
        samples = mix(f"{folder}/{name}.jsonl", kinds=objective.row_kinds).samples
        return rows_of(objective, opened.tokenizer, samples, length)

    held_out = rows("held", options.length)
    scores = held_out_scores(objective, opened.model, opened.tokenizer, held_out, options.batch)
    return scores["loss"], sum(len(row) for row in rows("train", 1 << 30))


def main() -> None:
    """Compares the sides."""
    parser = parser_of(__doc__, batch=2, learning_rate=2e-4)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--held-out", type=int, default=2)
    options = parser.parse_args()
    run("benchmarks.pretrain", options, measure, f"{options.documents} documents", {})


if __name__ == "__main__":
    main()
