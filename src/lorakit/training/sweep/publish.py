"""A configuration's folder made complete: the adapter, its record, and its curves.

The adapter of a configuration that was stopped early is that of its last checkpoint. Checkpoints
go when the sweep is finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import yaml

from lorakit import atomic
from lorakit.adapters.derived import TEMPLATE_NAME
from lorakit.adapters.manifest import METRICS_NAME, Manifest, write_manifest
from lorakit.data.templates import template_sha256
from lorakit.lora.checkpoint import INITIAL_NAME, WEIGHTS_NAME
from lorakit.lora.config import CONFIG_NAME
from lorakit.training.machine import peak_memory_mb
from lorakit.training.recipe import Recipe
from lorakit.training.run import versions
from lorakit.training.step_lines import StepLines
from lorakit.training.sweep.choosing.bootstrap import mean_loss
from lorakit.training.sweep.ground import REPORT, Ground
from lorakit.training.sweep.output import RECIPE_NAME
from lorakit.training.sweep.records import Record
from lorakit.training.sweep.row_losses import RowLosses
from lorakit.training.trainer import last_checkpoint, read_counts

_FILES = (INITIAL_NAME, "README.md", WEIGHTS_NAME, CONFIG_NAME)  # the configuration comes last


def publish(record: Record, ground: Ground, base: RowLosses) -> None:
    """Makes the folder of a configuration one that `chat`, `eval` and `merge` take.

    Losses in its record are those of the report rows, which choosing has not seen.
    """
    recipe = record.configuration.recipe
    folder = Path(recipe.output_dir)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        return  # done before
    if not record.finished:
        for name in _FILES:
            if (checkpoint / name).is_file():
                atomic.write_file(folder / name, (checkpoint / name).read_bytes())
    counts = read_counts(checkpoint)
    begun = ground.begun
    _write_curves(folder, record)
    if not begun.had_template and begun.tokenizer.chat_template:
        atomic.write_file(folder / TEMPLATE_NAME, begun.tokenizer.chat_template)
    stopped = f"stopped by the sweep at step {record.step} of {record.planned}"
    statistics = begun.data.statistics()
    write_manifest(
        folder,
        Manifest(
            base_model=recipe.model,
            recipe=recipe.to_dict(),
            data=[asdict(fact) for fact in begun.data.facts],
            data_statistics={name: asdict(part) for name, part in statistics.items()},
            template_sha256=template_sha256(begun.tokenizer),
            base_fingerprint=ground.base_fingerprint,
            notices=[*ground.notices, *([] if record.finished else [stopped])],
            steps=record.step,
            train_seconds=round(counts.seconds, 2),
            train_tokens=counts.train_tokens,
            supervised_tokens=counts.supervised_tokens,
            tokens_per_second=round(counts.train_tokens / max(counts.seconds, 1e-9), 1),
            peak_memory_mb=peak_memory_mb(),
            eval_loss=mean_loss(record.last.losses[REPORT]),
            base_eval_loss=mean_loss(base[REPORT]),
            labels=begun.labels.to_dict() if begun.labels else None,
            versions=versions(),
            seed=recipe.training.seed,
        ),
    )


def write_recipe(folder: Path, recipe: Recipe, winner: str) -> None:
    """Writes the winner's recipe, ready for `lorakit train`, into the sweep's folder."""
    values = recipe.to_dict()
    values["output_dir"] = f"{folder}-{winner}"
    values["data"] = {key: value for key, value in values["data"].items() if value is not None}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=88)
    head = (
        f"# {winner}, the winner of the sweep in {folder}: lorakit train {folder / RECIPE_NAME}\n"
    )
    atomic.write_file(folder / RECIPE_NAME, head + text)


def clean_up(folder: Path, names: Mapping[str, Recipe]) -> None:
    """Removes what only going on would need: checkpoints, and what a kill has left."""
    for recipe in names.values():
        for checkpoint in Path(recipe.output_dir).glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
    for left in folder.glob(".ranks-*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _write_curves(folder: Path, record: Record) -> None:
    """`metrics.jsonl`: what the runner logged, or else told, and the held-out losses."""
    logged = [x for x in StepLines(folder / METRICS_NAME).read() if "eval_loss" not in x]
    lines = logged or [{"step": step, "loss": loss} for step, loss in record.train_losses]
    for rung in record.rungs:
        lines.append({"step": rung.step, "eval_loss": mean_loss(rung.losses[REPORT])})
    lines.sort(key=lambda line: line["step"])
    atomic.write_file(folder / METRICS_NAME, "".join(f"{json.dumps(x)}\n" for x in lines))
