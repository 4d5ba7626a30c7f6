"""The folder of a sweep: what resuming requires, the disk it takes, and what is left in it.

Each configuration's folder is one that `chat`, `eval` and `merge` take. The adapter of one that
was stopped early is that of its last checkpoint; checkpoints go when the sweep is finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lorakit import atomic
from lorakit.adapters.manifest import METRICS_NAME, Manifest, write_manifest
from lorakit.bootstrap import mean_loss
from lorakit.commands import quoted
from lorakit.errors import InputError, listed
from lorakit.folder_lock import require_unlocked
from lorakit.lora.locate import CONFIG_NAME, INITIAL_NAME, WEIGHTS_NAME
from lorakit.models.template_files import write_templates
from lorakit.sweeps.records import Record
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.space.sweep_settings import SweepSettings
from lorakit.sweeps.sweep_base import SweepBase
from lorakit.training.checkpoints import newest_whole
from lorakit.training.differences import Difference, differences, overlook_moves
from lorakit.training.machine import peak_memory_mb
from lorakit.training.output import check_output
from lorakit.training.recipe import Recipe
from lorakit.training.recorder import StepLines, read_counts
from lorakit.training.run_record import versions

SWEEP_NAME = "sweep.json"
LEADERBOARD_NAME = "leaderboard.json"
RECIPE_NAME = "recipe.yaml"

_ADAPTER, _OPTIMISER = 4, 8  # bytes a parameter: float32, and Adam's two moments

_FILES = (INITIAL_NAME, "README.md", WEIGHTS_NAME, CONFIG_NAME)  # the configuration comes last


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raises InputError unless a sweep may start, or be resumed, in `folder`."""
    check_output(folder, resume=resume, marker=SWEEP_NAME, finished=LEADERBOARD_NAME, what="sweep")
    if folder.is_dir():
        for part in folder.iterdir():
            require_unlocked(part)  # a configuration that somebody trains by itself


def require_same(
    folder: Path,
    recipe: Recipe,
    settings: SweepSettings,
    ground: Mapping[str, Any] | None = None,
) -> bool:
    """Whether `folder` is a sweep's; then all that decides it must be the same.

    Args:
        ground: what rows and base are, None where they are not known yet.
    """
    path = folder / SWEEP_NAME
    if not path.is_file():
        return False
    now = _identity(recipe, settings, ground)
    try:
        changes = _changes(json.loads(path.read_text(encoding="utf-8")), now)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged: start again in another folder") from error
    if changes:
        lines = [change.line for change in changes]
        raise InputError(
            f"the sweep in {folder} cannot be resumed with other values: {listed(lines, 4)}. "
            "Give the same ones, or another folder"
        )
    return True


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """Where two sweeps differ, wherever their data and their base model lie."""
    if "ground" in now:
        sides = [{"recipe": side["recipe"], **side["ground"]} for side in (before, now)]
        if all(isinstance(side["data"], list) for side in sides):
            overlook_moves(*sides)
        return list(differences(before, now))
    # Whether another path is another place of the same is known with the data and the base.
    known = [json.loads(json.dumps({k: side[k] for k in now})) for side in (before, now)]
    for side in known:
        side["recipe"].pop("model", None)
        for name in ("train", "eval"):
            side["recipe"]["data"].pop(name, None)
    return list(differences(*known))


def claim_folder(
    folder: Path, recipe: Recipe, settings: SweepSettings, ground: Mapping[str, Any]
) -> None:
    """Marks `folder` as this sweep's; arguments and errors as in `require_same`."""
    if not require_same(folder, recipe, settings, ground):
        text = json.dumps(_identity(recipe, settings, ground), indent=2, ensure_ascii=False)
        atomic.write_file(folder / SWEEP_NAME, text + "\n")


def _identity(
    recipe: Recipe, settings: SweepSettings, ground: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All that decides a sweep's numbers, as JSON has it."""
    values = recipe.model_dump(mode="json", exclude_unset=True, exclude={"output_dir"})
    asked = settings.model_dump(mode="json", exclude={"engine", "workers"})
    known = {} if ground is None else {"ground": ground}
    return json.loads(json.dumps({"recipe": values, "sweep": asked, **known}))


def check_disk(
    folder: Path,
    configurations: Sequence[Configuration],
    parameters: Callable[[Recipe], int],
    total: int,
) -> None:
    """Raises InputError where the disk has no room for all adapters and their checkpoints.

    Args:
        parameters: how many a configuration trains.
        total: configurations of the whole sweep, of which these are the first.
    """
    needed = 0
    for configuration in configurations:
        if Path(configuration.recipe.output_dir).is_dir():
            continue  # it has taken its room
        kept = (configuration.recipe.training.save_total_limit or 10) + 1  # one is being written
        trained = parameters(configuration.recipe)
        needed += trained * (_ADAPTER + kept * (_ADAPTER + _OPTIMISER))
    needed = needed * max(1, total // max(1, len(configurations)))
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"output_dir: {total} configurations with their checkpoints take "
            f"{needed / 1e9:,.1f} GB and {place} has {free / 1e9:,.1f} GB free: sweep fewer, or "
            "lower training.save_total_limit or the ranks"
        )


def publish(record: Record, base: SweepBase) -> list[str]:
    """Makes the folder of a configuration one that `chat`, `eval` and `merge` take.

    One that has diverged leaves no adapter. Loss and scores in its record are those of all held-out
    rows by its own objective, as `lorakit train` has them.

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
    inputs, start = base.inputs, base.inputs.start
    objective = base.inputs_for(recipe).objective
    after, before = dict(record.scores), dict(base.bare_scores(objective))
    after.setdefault("loss", mean_loss(*record.last.losses.values()))
    warnings = [x for x in StepLines(folder / METRICS_NAME).read() if "warning" in x]
    _write_curves(folder, record)
    if inputs.own_tokenizer:
        inputs.tokenizer.save_pretrained(folder)
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
            eval_loss=after.pop("loss"),
            base_eval_loss=before.pop("loss"),
            eval_scores=after or None,
            base_eval_scores=before or None,
            parent=start.record if start else None,
            stands_on=list(start.frozen) if start else [],
            teacher=inputs.teacher,
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
