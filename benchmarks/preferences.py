"""An epoch over preference pairs or judged answers: TRL's trainers, and `lorakit train`.

    python -m benchmarks.preferences --data dpo_en_demo.json --objective dpo
    python -m benchmarks.preferences --data kto_en_demo.json --objective kto

The rows are a JSON list in LLaMA-Factory's forms: `conversations`, `chosen` and `rejected`, or
`messages` and `label`. All sides have the same rows, adapter, seed, batches and schedule, and no
second model: the reference is the base without the adapter.

- trl: DPOTrainer or KTOTrainer and PEFT as they come, with activation checkpointing.
- trl_plain: without it, which is faster and larger.
- lorakit: batches of as many rows, in one line, each prompt computed once.

Tokens are real ones of all sequences, padding not counted and a prompt as often as it has answers;
time is Trainer's whole loop. Longer sequences are cut at `--length`, which is TRL's default, and
rows of whose answers nothing is left then are left out for all. The scores of the held-out rows,
which are not cut, are taken of each side's saved adapter by one function.
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

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def measure(side: str, options: argparse.Namespace) -> Figures:
    """Trains one epoch in this process."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    training = one_epoch(options)
    clock = clock_of(transformers.Trainer)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = _divided(options, folder)
        if side == "lorakit":
            more = {"objective": options.objective, "data": {"max_length": options.length}}
            train = folder / "train.json"
            with_lorakit(options, options.model, train, training, folder, **more)
        else:
            training["gradient_checkpointing"] = side == "trl"
            _with_trl(rows, options, training, folder)
        memory = peak_memory_mb()
        scores, tokens = _scores(folder, options)
    return {
        "tokens_per_second": tokens / clock["seconds"],
        "memory_mb": memory,
        "accuracy": scores["accuracy"],
        "held_out_loss": scores["loss"],
        "first_step": clock["first_step"],
        "steps": clock["steps"],
    }


def _divided(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Writes the training and the held-out rows of the file, and returns the former."""
    from lorakit.data.mixing import mix
    from lorakit.models.names import resolve
    from lorakit.objectives.registry import make_objective

    rows = json.loads(options.data.read_text())
    parts = {"held": rows[-options.held_out :], "train": rows[: -options.held_out]}
    for name, part in parts.items():
        (folder / f"{name}.json").write_text(json.dumps(part))
    objective = make_objective(options.objective)
    tokenizer = resolve(options.model).layout.tokenizer()
    samples = mix(f"{folder}/train.json", kinds=objective.row_kinds).samples
    kept = [
        row
        for row, sample in zip(parts["train"], samples, strict=True)
        if objective.tokenize(sample, tokenizer, options.length).supervised
    ][: options.rows]
    (folder / "train.json").write_text(json.dumps(kept))
    return kept


def _with_trl(
    rows: list[dict[str, Any]], options: argparse.Namespace, training: dict[str, Any], folder: Path
) -> None:
    import datasets
    import peft
    import transformers
    import trl

    import lorakit

    model, tokenizer = lorakit.load_model(options.model, options.dtype)
    transformers.set_seed(42)
    if options.objective == "dpo":
        trainer_class, config_class = trl.DPOTrainer, trl.DPOConfig
        given = [
            {
                "prompt": [_message(m) for m in row["conversations"]],
                "chosen": [_message(row["chosen"])],
                "rejected": [_message(row["rejected"])],
            }
            for row in rows
        ]
    else:
        from trl.experimental.kto import KTOConfig, KTOTrainer

        trainer_class, config_class = KTOTrainer, KTOConfig
        given = [
            {
                "prompt": row["messages"][:-1],
                "completion": row["messages"][-1:],
                "label": row["label"],
            }
            for row in rows
        ]
    common = trl_arguments(options, training, folder)
    trainer = trainer_class(
        model=model,
        args=config_class(**common, max_length=options.length),
        train_dataset=datasets.Dataset.from_list(given),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(**FIELDS, task_type="CAUSAL_LM"),
    )
    warmed(trainer).train()
    trainer.model.save_pretrained(folder / "run")


def _message(said: dict[str, str]) -> dict[str, str]:
    return {"role": ROLES[said["from"]], "content": said["value"]}


def _scores(folder: Path, options: argparse.Namespace) -> tuple[dict[str, float], int]:
    """The held-out scores of the adapter in `folder`, and the real tokens of the training rows."""
    from lorakit.adapters.open import open_adapter
    from lorakit.data.masking import sequences_of
    from lorakit.data.mixing import mix
    from lorakit.evaluation.held_out import held_out_scores, rows_of
    from lorakit.objectives.registry import make_objective

    objective = make_objective(options.objective)
    opened = open_adapter(folder / "run", base=options.model, dtype=options.dtype)

    def rows(name: str, length: int) -> list[Any]:
        samples = mix(f"{folder}/{name}.json", kinds=objective.row_kinds).samples
        return rows_of(objective, opened.tokenizer, samples, length)

    held_out = rows("held", 1 << 20)
    scores = held_out_scores(objective, opened.model, opened.tokenizer, held_out, 4)
    return scores, sum(len(tokens) for tokens in sequences_of(rows("train", options.length)))


def main() -> None:
    """Compares the sides."""
    parser = parser_of(__doc__, batch=4, learning_rate=5e-5)
    parser.add_argument("--objective", choices=("dpo", "kto"), default="dpo")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=100)
    options = parser.parse_args()
    title = f"{options.objective}, {options.rows} rows"
    run("benchmarks.preferences", options, measure, title, {"accuracy": "accuracy"})


if __name__ == "__main__":
    main()
