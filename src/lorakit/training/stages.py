"""A run that starts from another run's adapter: what its recipe need not say, and its model.

The start is read anew whenever the run begins or is resumed, and its hash decides whether it is
still the same one. What is recorded of it is `adapters.lineage`'s.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.derived import base_of
from lorakit.adapters.inspect import fit
from lorakit.adapters.lineage import require_unchanged, whereabouts
from lorakit.adapters.manifest import read_manifest
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.lora.checkpoint import read_config
from lorakit.lora.config import LoraConfig
from lorakit.lora.routing import FROZEN
from lorakit.objectives.forward import BASE, TEACHER
from lorakit.objectives.objective import TrainingInputs

if TYPE_CHECKING:
    from lorakit.adapters.lineage import Mode, Start
    from lorakit.objectives.objective import Objective

TRAINED = "default"
REFERENCE = "reference"
"""A frozen copy of the start, which preference objectives compare with."""

LEARNED_FROM = "learned from"
"""What an adapter has to do with its teacher."""

_NOT_OF_RECIPES = (
    *("other_fields", "inference_mode", "base_model_name_or_path", "revision"),
    *("runtime_config", "auto_mapping", "peft_version"),
)
_FREE = ("lora_dropout",)
"""Fields that leave the values of an adapter what they are, so that a stage may have its own."""


def with_start(values: Mapping[str, Any], path: str, mode: Mode) -> dict[str, Any]:
    """A recipe's values with what the adapter in `path`, from which it starts, says.

    That are the base model and how it is quantised, and where the adapter is continued, all of
    `lora` but `lora_dropout`.

    Raises:
        InputError: there is no such adapter, or a value of `lora` is another than the adapter's.
    """
    values = dict(values)
    if path in ("lora", "qlora") and not Path(path).exists():  # as other tools name the method
        raise InputError(
            f"adapter: there is no folder {path}: a LoRA adapter is always trained (QLoRA: "
            "quantization=nf4); leave it out, or give the folder of the adapter to start from"
        )
    try:
        config, manifest = read_config(path), read_manifest(path)
    except InputError as error:
        raise InputError(f"adapter: {error}") from error
    if values.get("model") is None:
        values["model"] = base_of(path, config, None)
    if "quantization" not in values and manifest is not None:
        values["quantization"] = manifest.recipe.get("quantization")
    lora = values.get("lora") or {}
    if mode == "continue" and isinstance(lora, Mapping):
        recorded = manifest.recipe.get("lora") or {} if manifest else {}
        values["lora"] = _continued(path, config, recorded, lora)
    return values


def _continued(
    path: str, config: LoraConfig, recorded: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """`lora` of a recipe that continues the adapter in `path`.

    Args:
        config: the adapter's.
        recorded: `lora` of the recipe that it was trained by.
        given: `lora` of this recipe.
    """
    own = json.loads(config.to_json())
    usual = json.loads(LoraConfig().to_json())
    for name, value in given.items():
        if name not in usual or name in _FREE:
            continue
        if not any(_alike(value, one[name]) for one in (own, recorded) if name in one):
            raise InputError(
                f"lora.{name} is {value!r}, and the adapter that is continued has "
                f"{own.get(name)!r} ({path}): leave it out, or train a new adapter on top of it "
                "(adapter.mode=freeze)"
            )
    names = {f.name for f in dataclasses.fields(LoraConfig)} - {*_NOT_OF_RECIPES}
    always = ("r", "lora_alpha", "target_modules")
    found = {
        name: own[name]
        for name in own
        if name in names and (name in always or own[name] != usual[name])
    }
    kept = {name: value for name, value in given.items() if name in _FREE or name not in usual}
    return found | kept


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are the same names, in whatever order, or the same number."""
    if isinstance(one, (list, tuple, set)) and isinstance(other, list):
        return sorted(map(str, one)) == sorted(map(str, other))
    return bool(one == other) or (not one and not other)


# --- the model ------------------------------------------------------------------------------------


def check_start(
    start: Start, base: str, fingerprint: str | None, labels: Any, task_type: str
) -> None:
    """Raises InputError where an adapter cannot be the start of a run on this base.

    Args:
        base: the name of the run's base model.
        fingerprint: of its weights.
        labels: the classes of the run's rows, as the record has them; None without.
        task_type: the form of the base in the run.
    """
    record = start.files.record
    expected = record.base_fingerprint if record else None
    differs = None not in (expected, fingerprint) and expected != fingerprint
    if differs and start.files.task_type != task_type:  # the two forms have different heads
        differs = fit(start.folder, base).same_weights is False
    if differs:
        raise InputError(
            f"adapter: {start.folder} was trained on other weights than those of {base}: give the "
            "base that it was trained on (model)"
        )
    if labels is not None and start.files.labels and labels.names != start.files.labels:
        raise InputError(
            f"adapter: {start.folder} tells apart {', '.join(start.files.labels)}, and the rows "
            f"to learn from have {', '.join(labels.names)}: give rows with its labels"
        )


def started(inputs: TrainingInputs, config: LoraConfig) -> LoraModel:
    """The model with the adapter that is trained, and the frozen ones beside it.

    Args:
        inputs: the base, and the start if there is one.
        config: of the adapter that is trained.

    Raises:
        InputError: the start does not fit the base, or the new adapter does not go with it.
    """
    start = inputs.start
    if start is None:
        model = LoraModel(inputs.model, config)
        if inputs.objective.teacher is not None or inputs.objective.beside:
            load_beside(model, inputs.objective, None)
            _attach(model, inputs)
            model.set_adapter(TRAINED)
        return model
    if start.record.mode == "freeze" and config.init.kind.changes_base:
        raise InputError(
            f"lora.init_lora_weights={config.init_lora_weights} changes the base below the frozen "
            "adapter: choose another initialisation"
        )
    frozen = {f"{FROZEN}{i}": Path(one.path) for i, one in enumerate(start.frozen)}
    if start.record.mode == "freeze":  # first, as it may bring rows of new tokens
        (first, folder), *others = frozen.items()
        model = LoraModel.from_pretrained(
            inputs.model, folder, first, config=without_dropout(folder)
        )
        for name, folder in others:
            model.load_adapter(folder, name, config=without_dropout(folder))
        model.add_adapter(TRAINED, config)
    else:
        own = dataclasses.replace(read_config(start.folder), lora_dropout=config.lora_dropout)
        model = LoraModel.from_pretrained(
            inputs.model, start.folder, TRAINED, is_trainable=True, config=own
        )
        for name, folder in frozen.items():
            model.load_adapter(folder, name, config=without_dropout(folder))
    load_beside(model, inputs.objective, start.folder)
    _attach(model, inputs)
    model.set_adapter([TRAINED, *frozen])
    for name in frozen:
        model.set_requires_grad(name, False)
    return model


def _attach(model: LoraModel, inputs: TrainingInputs) -> None:
    """Adds the adapters that score completions for the objective, inactive."""
    for one in inputs.objective.beside:
        one.attach(model, inputs.tokenizer)


def set_reference(objective: Objective, start: Start | None) -> None:
    """Lets an objective that has a reference compare with the start, frozen or a copy of it."""
    if not objective.compares_with_start:
        return
    if objective.reference is None:
        return
    objective.reference = BASE
    if start is not None:
        objective.reference = f"{FROZEN}0" if start.record.mode == "freeze" else REFERENCE


def load_beside(model: LoraModel, objective: Objective, start: Path | None) -> None:
    """Adds the frozen adapters of the objective, inactive: a copy of the start, and a teacher.

    Args:
        start: the folder of the adapter that the run starts from, if it does.

    Raises:
        InputError: an adapter does not fit the base.
    """
    if start is not None and objective.reference == REFERENCE:
        model.load_adapter(start, REFERENCE, config=without_dropout(start))
    if objective.teacher is not None:
        folder = Path(objective.teacher)
        try:
            model.load_adapter(folder, TEACHER, config=without_dropout(folder))
        except InputError as error:
            raise InputError(f"objective.teacher: {error}") from error


def compare_with_start(model: LoraModel, folder: Path, objective: Objective) -> str:
    """Lets the objective of a finished run compare with what it compared with in training.

    Args:
        model: has the adapter in `folder` active.

    Returns: a notice where the start is not there any more, and the bare base takes its place.

    Raises:
        InputError: the adapter that it learned from is not there any more.
    """
    manifest = read_manifest(folder)
    if not objective.compares_with_start:
        if manifest is not None and manifest.teacher is not None:
            teacher = str(require_unchanged(manifest.teacher, folder, LEARNED_FROM))
            objective.settings = objective.settings.model_copy(update={"teacher": teacher})
            load_beside(model, objective, None)
        return ""
    if objective.reference is None or manifest is None or manifest.parent is None:
        return ""
    if manifest.parent.mode == "freeze":
        objective.reference = f"{FROZEN}0"
        return ""
    place, state = whereabouts(manifest.parent, folder)
    if state != "unchanged":
        return (
            f"{folder} was compared with {manifest.parent.path} in training, which is {state}: "
            "rewards are those over the bare base"
        )
    objective.reference = REFERENCE
    load_beside(model, objective, place)
    return ""


def without_dropout(folder: Path) -> LoraConfig:
    """The configuration of an adapter that is frozen."""
    return dataclasses.replace(read_config(folder), lora_dropout=0.0)
