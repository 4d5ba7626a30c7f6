"""Running a finished run again from its record, and comparing what comes out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.chat_template import adapter_template, template_notice
from lorakit.adapters.lineage import require_unchanged, whereabouts
from lorakit.adapters.manifest import MANIFEST_NAME, Manifest, read_manifest
from lorakit.data.template_clock import Rendering, draws_at_random
from lorakit.errors import InputError, listed
from lorakit.lora.checkpoint import read_adapter
from lorakit.models.template_files import digest, read_templates
from lorakit.rewards.reward_specs import foreign_programs
from lorakit.training.continuing import takes_effect
from lorakit.training.differences import moved
from lorakit.training.recipe import load_recipe
from lorakit.training.run import train
from lorakit.training.run_record import versions
from lorakit.training.stages import LEARNED_FROM

SAME_GAIN = 0.1  # of what was learned: another machine or another release may change as much


@dataclass(frozen=True)
class Reproduction:
    """A run and its repetition.

    Attributes:
        identical: every tensor of the adapter has the same bits.
        largest_difference: between two numbers of the adapters.
        losses: held-out loss by name, of the run and of its repetition; without held-out rows
            there is none.
        changed: what is not as it was (versions, the base model), as lines.
    """

    before: Manifest
    after: Manifest
    identical: bool
    largest_difference: float
    losses: dict[str, tuple[float, float]]
    changed: list[str]

    @property
    def reproduced(self) -> bool:
        """Whether the adapter is identical, or has learned as much, by the held-out rows."""
        if self.identical or not self.losses:
            return self.identical
        base, _ = self.losses["base"]
        old, new = self.losses["adapter"]
        return abs(new - old) <= SAME_GAIN * abs(base - old)


def reproduce(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    quiet: bool = False,
    model: str | None = None,
    data: Sequence[str] = (),
    start: str | Path | None = None,
    run_rewards: bool = False,
) -> Reproduction:
    """Trains again what is recorded in `adapter`'s folder, into the new folder `output_dir`.

    Args:
        model: where the base model lies now, if it has moved.
        data: where the recorded sources of rows lie now, in their order, if they have moved.
        start: an adapter to start from in place of the recorded one, such as its repetition; None
            is the recorded one, which must be as it was.
        run_rewards: reward functions, environment and tools of files and modules that the record
            names may be run.

    Raises:
        InputError: the folder has no record, it names programs that may not be run, or the data are
            not those that were learned.
        LorakitError: training failed.
    """
    before = read_manifest(adapter)
    if before is None:
        raise InputError(
            f"{adapter} has no {MANIFEST_NAME}: only what lorakit trained can be run again"
        )
    changed = [entry for entry in before.continued if not _is_idle(entry)]
    if changed:
        raise InputError(
            f"{adapter} was resumed with another recipe or other data after step "
            f"{changed[0]['step']}: no single recipe reproduces it"
        )
    if (foreign := foreign_programs(before.recipe.get("objective"))) and not run_rewards:
        raise InputError(
            f"{adapter}: its record names files or modules that would be run: "
            f"{listed(foreign)}. Look at them, and allow them with --run-rewards"
        )
    _, old = read_adapter(adapter)
    values = _moved(before, model, data) | {"output_dir": str(output_dir)}
    if before.parent is not None:
        place = start or require_unchanged(
            before.parent, adapter, "started from", ", or make it again first (--chain)"
        )
        values["adapter"] = {"path": str(place), "mode": before.parent.mode}
    if before.teacher is not None:
        place = require_unchanged(before.teacher, adapter, LEARNED_FROM)
        values["objective"] = {**values["objective"], "teacher": str(place)}
    recipe = load_recipe(values)
    rendering = _rendering(adapter, before)
    after = train(
        recipe,
        quiet=quiet,
        expected_data=before.data,
        expected_rewards=before.rewards,
        expected_environment=before.environment,
        rendering=rendering,
    ).manifest
    _, new = read_adapter(output_dir)
    if old.keys() != new.keys():
        raise InputError(
            f"the adapters have other tensors: {listed(sorted(old.keys() ^ new.keys()))}"
        )
    losses = {
        "base": (before.base_eval_loss, after.base_eval_loss),
        "adapter": (before.eval_loss, after.eval_loss),
    }
    return Reproduction(
        before=before,
        after=after,
        identical=all(torch.equal(old[name], new[name]) for name in old),
        largest_difference=max(
            ((old[name].float() - new[name].float()).abs().max().item() for name in old),
            default=0.0,
        ),
        losses={
            name: (was, now)
            for name, (was, now) in losses.items()
            if was is not None and now is not None
        },
        changed=_changed(adapter, before, after),
    )


def reproduce_chain(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    quiet: bool = False,
    model: str | None = None,
    data: Sequence[str] = (),
    run_rewards: bool = False,
) -> list[tuple[Path, Reproduction]]:
    """As `reproduce`, the adapters first that it came from, each from the repetition before it.

    Returns: the folders and their repetitions; `output_dir` is the last, and `<output_dir>-stage1`
        and so on those before it.

    Raises:
        InputError: an adapter of the chain is missing or lorakit did not train it.
    """
    places = [Path(adapter)]
    while (manifest := read_manifest(places[0])) is not None and manifest.parent is not None:
        parent, state = whereabouts(manifest.parent, places[0])
        if state == "missing" or read_manifest(parent) is None:
            why = "is missing" if state == "missing" else f"has no {MANIFEST_NAME}"
            raise InputError(
                f"{places[0]} started from {parent}, which {why}, so that it cannot be made again"
            )
        places.insert(0, parent)
    found: list[tuple[Path, Reproduction]] = []
    for number, place in enumerate(places, 1):
        last = place is places[-1]
        folder = Path(output_dir) if last else Path(f"{output_dir}-stage{number}")
        start = found[-1][0] if found else None
        own = data if last else ()
        options: dict[str, Any] = {"quiet": quiet, "model": model, "run_rewards": run_rewards}
        one = reproduce(place, folder, data=own, start=start, **options)
        found.append((folder, one))
    return found


def _is_idle(entry: Mapping[str, Any]) -> bool:
    """Whether what changed then changed nothing of the adapter, such as how often it was logged."""
    keys = entry.get("keys", ())
    return bool(keys) and len(keys) == len(entry["changes"]) and not takes_effect(keys)


def _moved(before: Manifest, model: str | None, data: Sequence[str]) -> dict[str, Any]:
    """The recorded recipe with the places where its base model and rows lie now."""
    recipe: dict[str, Any] = json.loads(json.dumps(before.recipe))
    if model is not None:
        recipe["model"] = model
    if data:
        paths = [fact["path"] for fact in before.data]
        if len(paths) != len(data):
            raise InputError(
                f"--data was given {len(data)} times, and the record has {len(paths)} sources of "
                f"rows: {listed(paths, 4)}; give each, in this order"
            )
        for key in ("train", "eval"):
            recipe["data"][key] = moved(recipe["data"][key], dict(zip(paths, data, strict=True)))
    return recipe


def _rendering(adapter: str | Path, before: Manifest) -> Rendering:
    """The chat template that lies beside the adapter, if it is the recorded one, and the time."""
    trained = adapter_template(adapter)
    kept = trained.own is not None and trained.sha256 == digest(trained.own)
    time = before.template_time
    try:
        return Rendering(
            trained.own if kept else None, datetime.fromisoformat(time) if time else None
        )
    except ValueError as error:
        raise InputError(f"{adapter}: its record has no time in template_time: {time!r}") from error


def _changed(adapter: str | Path, before: Manifest, after: Manifest) -> list[str]:
    """What is not as it was: versions, processes, the base model, the tokens of the same rows."""
    now = versions()
    changed = [
        f"{name} was {version} and is {now.get(name, 'missing')}"
        for name, version in before.versions.items()
        if now.get(name) != version
    ]
    if before.processes != after.processes:
        changed.append(f"it had {before.processes} processes and has {after.processes}")
    if before.base_fingerprint != after.base_fingerprint:
        changed.append(f"{before.base_model} has other weights than it had")
    if before.template_sha256 and (notice := template_notice(adapter, before.base_model)):
        changed.append(notice)
    if after.template_time and before.template_time is None:
        changed.append(
            "the chat template writes the date into rows, and the record does not say which it was"
        )
    if draws_at_random(read_templates(after.recipe["output_dir"])):
        changed.append("the chat template draws at random: its rows are never the same")
    return changed
