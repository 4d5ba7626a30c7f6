"""LoRA+ for a run: Trainer's optimiser, whichever it is, over groups in which `B` learns faster."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_optimizer import is_optimizer_factory

from lorakit.errors import InputError
from lorakit.lora.optimizers import loraplus_groups


def over_loraplus_groups(
    model: nn.Module, args: TrainingArguments, ratio: float, kind: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """An optimiser's class and its arguments, with parameters in the groups of LoRA+.

    Args:
        ratio: how many times faster `B` learns than `A`.
        kind, options: as Trainer chose them.

    Raises:
        InputError: the optimiser divides the parameters itself.
    """
    if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & options.keys():
        name = getattr(args.optim, "value", args.optim)
        raise InputError(
            f"training.loraplus_lr_ratio does not go with training.optim={name}, which divides "
            "the parameters itself: leave one of them out"
        )
    groups = loraplus_groups(model, args.learning_rate, ratio, args.weight_decay)
    return kind, {**options, "params": [group for group in groups if group["params"]]}
