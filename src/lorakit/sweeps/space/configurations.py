"""Draws as complete recipes with names, each checked before anything is trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import InputError
from lorakit.report.numbers import value_text
from lorakit.training.recipe import Recipe, load_recipe

_SHORT = {
    "lora.r": "r",
    "lora.lora_alpha": "a",
    "lora.lora_dropout": "drop",
    "lora.init_lora_weights": "init-",
    "lora.use_rslora": "rs-",
    "lora.use_dora": "dora-",
    "lora.target_modules": "",
    "objective.loss_type": "",
    "training.learning_rate": "lr",
    "training.lr_scheduler_type": "",
    "training.seed": "seed",
    "training.weight_decay": "wd",
    "training.warmup_steps": "warm",
    "training.num_train_epochs": "ep",
    "training.max_steps": "steps",
    "training.per_device_train_batch_size": "bs",
    "training.loraplus_lr_ratio": "plus",
}
_LONGEST_NAME = 40
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

_ALIKE = "is the same for all configurations of a sweep, so that their losses can be compared"
_FIXED = {
    "model": _ALIKE,
    "dtype": _ALIKE,
    "data": _ALIKE,
    "adapter": _ALIKE,
    "tokens": _ALIKE,
    "chat_template": _ALIKE,
    "lora.task_type": _ALIKE,
    "lora.layer_replication": "changes the base, which all configurations share",
    "compile": "changes how fast numbers come and not what they are",
    "samples": "changes nothing of the adapter",
    "output_dir": "is the sweep's folder",
    "early_stopping_patience": "is lorakit train's: a sweep stops what loses by itself",
    "eval": "is lorakit train's: a sweep scores answers of finished runs by sweep.objective",
    "training.load_best_model_at_end": "is lorakit train's: a sweep compares what training ends in",
    "training.save_only_model": "is lorakit train's: a sweep is resumed from its checkpoints",
}


@dataclass(frozen=True)
class Configuration:
    """One point of a sweep.

    Attributes:
        name: of its folder; unique and short: `r8-lr3e-4`, or `c03` where that is long.
        changes: the swept dotted keys and their values.
        recipe: complete; `recipe.output_dir` is `<sweep>/<name>`.
    """

    name: str
    changes: Mapping[str, Any]
    recipe: Recipe


def check_keys(recipe: Recipe, keys: Sequence[str]) -> None:
    """Raises InputError for a key that cannot be swept, or a recipe that cannot."""
    for key in keys:
        for fixed, why in _FIXED.items():
            if key == fixed or key.startswith(f"{fixed}."):
                raise InputError(f"--over {key}: it {why}; leave it out")
    if recipe.early_stopping_patience:
        raise InputError(f"early_stopping_patience {_FIXED['early_stopping_patience']}; remove it")
    if recipe.eval.generate:
        raise InputError(f"eval.generate {_FIXED['eval']}; remove it")
    for key in ("load_best_model_at_end", "save_only_model"):
        if (recipe.training.model_extra or {}).get(key):
            name = f"training.{key}"
            raise InputError(f"{name} {_FIXED[name]}; remove it")


def changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """`recipe` with other values; what it leaves open stays open."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    if any(key.startswith("objective.") for key in changes):
        values["objective"] = recipe.make_objective().to_dict()
    try:
        return load_recipe(values, changes.items())
    except InputError as error:
        reason = str(error).removeprefix("recipe: ")
        raise InputError(f"--over {_listed(changes)}: {reason}") from error


def configurations(
    recipe: Recipe,
    draws: Sequence[Mapping[str, Any]],
    complete: Callable[[Recipe], Recipe],
    taken: Sequence[Configuration] = (),
) -> list[Configuration]:
    """A configuration for each draw; `recipe.output_dir` is the sweep's folder.

    Args:
        complete: fills in what a recipe leaves open.
        taken: those that there are already.

    Raises:
        InputError: a recipe is not valid, or two are the same.
    """
    seen = {_identity(c.recipe): c.changes for c in taken}
    names = {c.name.lower() for c in taken}
    found = []
    for changes in draws:
        full = complete(changed(recipe, changes))
        if full.make_objective().name != recipe.make_objective().name:
            raise InputError(
                f"--over {_listed(changes)}: all configurations of a sweep have one objective; "
                "sweep its settings (objective.beta=…), or each objective by itself"
            )
        own = _identity(full)
        if own in seen:
            raise InputError(
                f"{_listed(seen[own])} and {_listed(changes)} are the same configuration: "
                "remove one"
            )
        seen[own] = changes
        name = name_of(changes)
        if name is None or name.lower() in names:
            name = f"c{len(names) + 1:02d}"
        names.add(name.lower())
        full = full.filled_in({"output_dir": str(Path(recipe.output_dir) / name)})
        found.append(Configuration(name, dict(changes), full))
    return found


def name_of(changes: Mapping[str, Any]) -> str | None:
    """`r8-lr3e-4`; None where values make no short name."""
    parts = [f"{_SHORT.get(key, key.rpartition('.')[2])}{shown(v)}" for key, v in changes.items()]
    name = "-".join(parts)
    return name if _PLAIN.fullmatch(name) and len(name) <= _LONGEST_NAME else None


def shown(value: Any) -> str:
    """A value as people write it: `3e-4`, `true`, `[q_proj, v_proj]`."""
    return f"[{', '.join(map(shown, value))}]" if isinstance(value, list) else value_text(value, 6)


def _listed(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in changes.items())


def _identity(recipe: Recipe) -> str:
    """The same for recipes that mean the same: what is left out has its default, and 0.0 is 0."""
    values = recipe.to_dict()
    del values["output_dir"]
    values["lora"] = json.loads(recipe.lora_config().to_json())
    return json.dumps(_plain(values), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
