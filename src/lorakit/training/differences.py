"""Where two runs differ: by recipe, data, base model or processes.

Data that moved and have the same bytes are the same data, and a base model that moved and has the
same weights is the same model. A recipe's default values count as left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A dotted key with two values, as JSON has them; None where there is none."""

    key: str
    before: Any
    now: Any

    @property
    def line(self) -> str:
        """The difference in words."""
        return f"{self.key} was {self.before!r} and is {self.now!r}"


def run_identity(
    recipe: dict[str, Any],
    data: list[dict[str, Any]],
    processes: int = 1,
    base: str | None = None,
    template_sha256: str | None = None,
    template_time: str | None = None,
    parent: str | None = None,
    teacher: str | None = None,
    rewards: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """All that decides a run's numbers, as plain JSON types.

    Args:
        base: the fingerprint of the base model's weights; None where it is not known.
        template_sha256: of the chat template; None where rows have none.
        template_time: what a template that reads the clock has read; a resumed run reads the same,
            so that it is no difference.
        parent, teacher: the digests of the adapters that it starts from and learns from; None
            without one.
        rewards: `Objective.reward_facts`, of which the hashes of files count.
        environment: SHA-256 of the files of an environment and of tools, by name.
    """
    values = {
        "recipe": {key: value for key, value in recipe.items() if key != "output_dir"},
        "data": data,
        "processes": processes,
        "base": base,
        "template": template_sha256,
        "template_time": template_time,
        "parent": parent,
        "teacher": teacher,
        "rewards": {one["name"]: one["sha256"] for one in rewards},
        "environment": dict(environment or {}),
    }
    return _as_json(values)


def run_differences(before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """Where two runs' identities differ."""
    before, now = _as_json(before), _as_json(now)
    for key in ("base", "template", "rewards", "environment"):  # an older record has none
        if before.get(key) is None:
            before[key] = now.get(key)
    overlook_moves(before, now)
    for values in (before, now):
        _leave_out_defaults(values["recipe"])
        values["data"] = _by_path(values["data"])
        for name in ("continued", "template_time"):
            values.pop(name, None)
    return list(differences(before, now))


def differences(before: Any, now: Any, key: str = "") -> Iterator[Difference]:
    """Where two values differ, inside mappings too."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            inner = f"{key}.{name}".removeprefix(".").removeprefix("recipe.")
            yield from differences(before.get(name), now.get(name), inner)
    elif before != now:
        yield Difference(key, before, now)


def overlook_moves(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Gives `before` the paths of `now` where these are places of the same bytes or weights.

    Args:
        before, now: a `recipe`, its `data` (facts of each source), the fingerprint of its `base`
            and the digests of its `parent` and `teacher`.
    """
    base = now.get("base")
    if base is not None and before.get("base") == base:
        before["recipe"]["model"] = now["recipe"]["model"]
    starts = [side["recipe"].get("adapter") for side in (before, now)]
    if now.get("parent") is not None and before.get("parent") == now["parent"] and all(starts):
        before["recipe"]["adapter"] = starts[0] | {"path": starts[1]["path"]}
    if now.get("teacher") is not None and before.get("teacher") == now["teacher"]:
        objectives = [side["recipe"].get("objective") for side in (before, now)]
        before["recipe"]["objective"] = objectives[0] | {"teacher": objectives[1]["teacher"]}
    if len(before["data"]) != len(now["data"]):
        return
    places = {}
    for old, new in zip(before["data"], now["data"], strict=True):
        if old.get("sha256") == new.get("sha256"):
            places[old["path"]] = new["path"]
            old["path"] = new["path"]
    rows = before["recipe"].get("data", {})
    for key in ("train", "eval"):
        if key in rows:
            rows[key] = moved(rows[key], places)


def _by_path(data: list[dict[str, Any]]) -> dict[str, Any]:
    """Each source's facts under its path; held-out rows may be of the same source again."""
    found: dict[str, Any] = {}
    for fact in data:
        name = fact["path"]
        while name in found:
            name += " again"
        found[name] = {key: value for key, value in fact.items() if key != "path"}
    return found


def moved(source: Any, places: Mapping[str, str]) -> Any:
    """A recipe's `data.train` or `data.eval` with other paths, by the ones that it has."""
    if isinstance(source, list):
        return [moved(item, places) for item in source]
    if isinstance(source, dict):
        return {**source, "path": moved(source["path"], places)}
    return places.get(source, source) if isinstance(source, str) else source


def _leave_out_defaults(recipe: dict[str, Any]) -> None:
    """Takes out of `lora` and `training` what says no more than leaving it out."""
    from transformers import TrainingArguments

    from lorakit.lora.config import LoraConfig
    from lorakit.training.recipe import TrainingRecipe

    for section, kind, kept in (
        ("lora", LoraConfig, {"r", "lora_alpha", "target_modules", "task_type"}),
        ("training", TrainingArguments, {*TrainingRecipe.model_fields}),
    ):
        defaults = {f.name: f.default for f in dataclasses.fields(kind)}
        values = recipe.get(section)
        if isinstance(values, dict):
            for name in values.keys() - kept:
                if values[name] is None or values[name] == defaults.get(name, values):
                    del values[name]


def _as_json(values: Any) -> Any:
    return json.loads(json.dumps(values))
