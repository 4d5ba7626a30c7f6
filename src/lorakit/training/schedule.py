"""The learning rate of every step, with a warm-up that begins above 0, and of `B` in LoRA+.

Step k of a warm-up over w steps has (k + 1) / w of the rate, where transformers has k / w and the
first step changes nothing. What a schedule is given is tried before training begins.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory

from lorakit.errors import InputError
from lorakit.lora.optimizers import loraplus_groups

_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
_LOOKED_AT = 100_000  # steps of a longer run are looked at evenly spread


def warm_from_first(scheduler: Any, warmup: int, steps: int) -> Any:
    """`scheduler` with a warm-up whose first step has a rate above 0.

    Args:
        scheduler: as `transformers.get_scheduler` makes it, before its first step. Its warm-up
            ends in the whole rate, as all of them do. One that begins above 0 stays as it is.
        warmup: the steps of the warm-up; it may be longer than the run.
        steps: of the whole run.
    """
    if not isinstance(scheduler, LambdaLR):  # goes by evaluations, and begins with the whole rate
        return scheduler
    if warmup < 1 or any(own(0) != 0 for own in scheduler.lr_lambdas):
        return scheduler
    # A partial, as a scheduler's state has what other callable objects hold.
    lambdas: list[Callable[[int], float]] = [
        partial(_factor, own=own, warmup=warmup, steps=steps) for own in scheduler.lr_lambdas
    ]
    return LambdaLR(scheduler.optimizer, lambdas)


def _factor(step: int, *, own: Callable[[int], float], warmup: int, steps: int) -> float:
    """What the rate is multiplied by at `step`, counted from 0."""
    if step + 1 < warmup:
        return own(step + 1)
    if step < warmup or warmup >= steps:  # nothing decays behind a warm-up that takes the whole run
        return 1.0
    return own(step)


def check_schedule(args: TrainingArguments, steps: int) -> list[str]:
    """Notices about a run's schedule of learning rates.

    Args:
        steps: optimiser steps of the run.

    Raises:
        InputError: the schedule does not take what it is given, or its rate is always 0.
    """
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.lr_scheduler_kwargs and name in _WITHOUT_OPTIONS:
        raise InputError(
            f"training.lr_scheduler_kwargs has no effect with lr_scheduler_type {name}, which "
            "takes none: leave it out"
        )
    try:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
        warmup = args.get_warmup_steps(steps)
        scheduler = get_scheduler(name, optimizer, warmup, steps, args.lr_scheduler_kwargs)
        scheduler = warm_from_first(scheduler, warmup, steps)
        rates = _rates(scheduler, steps)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"training.lr_scheduler_kwargs: the schedule {name} refuses "
            f"{args.lr_scheduler_kwargs or 'to be without them'}: {error}"
        ) from error
    idle = sum(rate == 0 for rate in rates) * steps // len(rates)
    if not any(rates):
        raise InputError(
            f"the learning rate is 0 at each of {steps:,} steps: change training.lr_scheduler_type "
            "or lr_scheduler_kwargs"
        )
    notices = []
    if idle:
        notices.append(
            f"the learning rate is 0 at {idle:,} of {steps:,} steps, which change nothing: see "
            "training.lr_scheduler_kwargs"
        )
    if warmup and name in _WITHOUT_WARMUP:
        instead = "constant_with_warmup has one" if name == "constant" else "it begins at the rate"
        notices.append(
            f"training.warmup_steps has no effect: the schedule {name} has no warm-up ({instead})"
        )
    elif warmup > steps:
        notices.append(
            f"the warm-up of {warmup:,} steps is longer than the run of {steps:,}: the learning "
            f"rate comes up to {max(rates):.3g} of {args.learning_rate:.3g}"
        )
    return notices


def _rates(scheduler: Any, steps: int) -> list[float]:
    """The rates of the run's steps, or of some of many."""
    if not isinstance(scheduler, LambdaLR):
        return [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    [factor], [base] = scheduler.lr_lambdas, scheduler.base_lrs
    looked_at = range(0, steps, -(-steps // _LOOKED_AT))
    return [float(base) * factor(step) for step in looked_at]


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
