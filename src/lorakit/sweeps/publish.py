"""A configuration's folder made complete: the adapter, its record, and its curves.

The adapter of a configuration that was stopped early is that of its last checkpoint. Checkpoints
go when the sweep is finished.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lorakit import atomic
from lorakit.adapters.manifest import METRICS_NAME, Manifest, write_manifest
from lorakit.commands import quoted
from lorakit.lora.locate import CONFIG_NAME, INITIAL_NAME, WEIGHTS_NAME
from lorakit.models.template_files import write_templates
from lorakit.sweeps.bootstrap import mean_loss
from lorakit.sweeps.records import Record
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.sweep_base import SweepBase
from lorakit.sweeps.sweep_folder import RECIPE_NAME
from lorakit.training.checkpoints import newest_whole
from lorakit.training.machine import peak_memory_mb
from lorakit.training.recorder import StepLines, read_counts
from lorakit.training.run_record import versions

_FILES = (INITIAL_NAME, "README.md", WEIGHTS_NAME, CONFIG_NAME)  # the configuration comes last


def publish(record: Record, base: SweepBase) -> list[str]:
    """Makes the folder of a configuration one that `chat`, `eval` and `merge` take.

    One that has diverged leaves no adapter. Losses in its record are those of all held-out rows.

    Returns: the warnings of its training, a line each.
    """
    if record.diverged is not None:
        return []
    recipe = record.configuration.recipe
    folder = Path(recipe.output_dir)
    checkpoint = newest_whole(folder).checkpoint
    if checkpoint is None:
        return []  # done before
    if not record.finished:
        for name in _FILES:
            if (checkpoint / name).is_file():
                atomic.write_file(folder / name, (checkpoint / name).read_bytes())
    counts = read_counts(checkpoint)
    inputs = base.inputs
    warnings = [x for x in StepLines(folder / METRICS_NAME).read() if "warning" in x]
    _write_curves(folder, record)
    if inputs.templates is not None:
        write_templates(folder, inputs.templates)
    stopped = f"stopped by the sweep at step {record.step} of {record.planned}"
    write_manifest(
        folder,
        Manifest(
            base_model=recipe.model,
            recipe=recipe.to_dict(),
            data=base.facts,
            data_statistics={k: asdict(part) for k, part in inputs.data.statistics().items()},
            **inputs.rendering_facts(),
            base_fingerprint=base.fingerprint,
            notices=[*base.notices, *([] if record.finished else [stopped])],
            warnings=warnings,
            steps=record.step,
            train_seconds=round(counts.seconds, 2),
            train_tokens=counts.train_tokens,
            supervised_tokens=counts.supervised_tokens,
            tokens_per_second=round(counts.train_tokens / max(counts.seconds, 1e-9), 1),
            peak_memory_mb=peak_memory_mb(),
            eval_loss=mean_loss(*record.last.losses.values()),
            base_eval_loss=mean_loss(*base.bare_losses.values()),
            labels=inputs.objective.labels.to_dict() if inputs.objective.labels else None,
            versions=versions(),
            seed=recipe.training.seed,
        ),
    )
    return [f"warning, {record.name}: {line['message']}. {line['cure']}" for line in warnings]


def write_recipe(folder: Path, winner: Configuration) -> None:
    """Writes the winner's recipe, ready for `lorakit train`, into the sweep's folder."""
    values = winner.recipe.to_dict()
    values["output_dir"] = f"{folder}-{winner.name}"
    head = (
        f"# {winner.name}, the winner of the sweep in {folder}: "
        f"lorakit train {quoted(folder / RECIPE_NAME)}\n"
    )
    text = yaml.safe_dump(_set_keys(values), sort_keys=False, allow_unicode=True, width=88)
    atomic.write_file(folder / RECIPE_NAME, head + text)


def clean_up(folder: Path) -> None:
    """Removes what only resuming needs: checkpoints, and what a kill has left."""
    for pattern in ("*/checkpoint-*", ".ranks-*.tmp"):
        for left in folder.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _set_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Without keys that are None: a recipe leaves them out."""
    return {
        key: _set_keys(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _write_curves(folder: Path, record: Record) -> None:
    """`metrics.jsonl`: what the runner logged, or else told, and the held-out losses."""
    logged = [x for x in StepLines(folder / METRICS_NAME).read() if "eval_loss" not in x]
    lines = logged or [{"step": step, "loss": loss} for step, loss in record.train_losses]
    for rung in record.rungs:
        lines.append({"step": rung.step, "eval_loss": mean_loss(*rung.losses.values())})
    lines.sort(key=lambda line: line["step"])
    atomic.write_file(folder / METRICS_NAME, "".join(f"{json.dumps(x)}\n" for x in lines))
