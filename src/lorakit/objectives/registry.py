"""The objectives by name: one line for each, and `register` for those of other packages."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, did_you_mean, listed

if TYPE_CHECKING:
    from lorakit.objectives.objective import Objective

_BUILT_IN = {
    "sft": "lorakit.objectives.sft:Sft",
    "pretrain": "lorakit.objectives.pretrain:Pretrain",
    "dpo": "lorakit.objectives.dpo:Dpo",
    "simpo": "lorakit.objectives.simpo:Simpo",
    "orpo": "lorakit.objectives.orpo:Orpo",
    "kto": "lorakit.objectives.kto:Kto",
    "reward": "lorakit.objectives.reward:Reward",
    "classification": "lorakit.objectives.classification:Classification",
    "tagging": "lorakit.objectives.tagging:Tagging",
    "distill": "lorakit.objectives.distill:Distill",
    "grpo": "lorakit.objectives.grpo:Grpo",
    "seq2seq": "lorakit.objectives.seq2seq:Seq2Seq",
}
"""Where each is defined; loaded when it is first used."""

_OF_TASK_TYPE = {
    "CAUSAL_LM": "sft",
    "SEQ_CLS": "classification",
    "TOKEN_CLS": "tagging",
    "SEQ_2_SEQ_LM": "seq2seq",
}
"""What is learned where a recipe does not say."""

_registered: dict[str, type[Objective]] = {}


def register(kind: type[Objective]) -> type[Objective]:
    """Makes an objective known by its `name`, in recipes too; also as a decorator.

    Raises:
        InputError: the name is taken.
    """
    if kind.name in _BUILT_IN:
        raise InputError(f"the objective {kind.name} is lorakit's own: take another name")
    _registered[kind.name] = kind
    return kind


def registered(objective: Objective) -> Objective:
    """`objective`, whose class is known by its name from here on.

    Raises:
        InputError: the name is that of another objective of lorakit's.
    """
    kind = type(objective)
    if kind.name not in _BUILT_IN or objective_class(kind.name) is not kind:
        register(kind)
    return objective


def objective_class(name: str) -> type[Objective]:
    """The class of the objective `name`. Raises InputError where there is none."""
    if name in _registered:
        return _registered[name]
    if name not in _BUILT_IN:
        known = [*_BUILT_IN, *_registered]
        raise InputError(
            f"objective: there is no '{name}'{did_you_mean(name, known)}; there are "
            f"{listed(known, 20)} (others after lorakit.objectives.registry.register)"
        )
    module, _, attribute = _BUILT_IN[name].partition(":")
    found: type[Objective] = getattr(import_module(module), attribute)
    return found


def make_objective(settings: str | Mapping[str, Any]) -> Objective:
    """The objective of a recipe's `objective`: a name, or a `type` with settings.

    Raises:
        InputError: it is none, or a setting cannot be used.
    """
    if isinstance(settings, str):
        settings = {"type": settings}
    values = dict(settings)
    name = values.pop("type", None)
    if not isinstance(name, str):
        raise InputError("objective: give its type, as in {type: sft}")
    if name in values:
        raise InputError(f"objective.{name} is not a setting: give type: {name}")
    return objective_class(name)(**values)


def with_setting(name: str) -> list[str]:
    """The objectives that have a setting of this name."""
    known = (*_BUILT_IN, *_registered)
    return [one for one in known if name in objective_class(one).Settings.model_fields]


def default_objective(task_type: str) -> Objective:
    """What is learned with a model of this form (PEFT's task type) where a recipe does not say.

    Raises:
        InputError: there is no such form.
    """
    if task_type not in _OF_TASK_TYPE:
        near = did_you_mean(task_type.upper(), _OF_TASK_TYPE)
        raise InputError(
            f"lora.task_type cannot be {task_type}{near}: lorakit trains {', '.join(_OF_TASK_TYPE)}"
        )
    return objective_class(_OF_TASK_TYPE[task_type])()
