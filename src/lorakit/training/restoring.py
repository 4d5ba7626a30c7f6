"""Optimiser and schedule of a resumed run: state from its checkpoint, values from its recipe.

A checkpoint's moments and counters are taken over; learning rate, weight decay and so on are the
recipe's, so that a changed recipe takes effect and an unchanged one gives the same bits. States are
saved whole, as one process has them, by however many processes and however spread.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from lorakit.lora.checkpoint import spread_like, whole
from lorakit.training.checkpoints import read_seal

if TYPE_CHECKING:
    from transformers import TrainingArguments

_STATE = {
    "params",
    # of optimisers without a schedule and those that find their own learning rate
    *("k", "train_mode", "weight_sum", "lr_max", "lr_sum", "scheduled_lr", "step"),
    *("d", "d_hat", "d_max", "d_numerator", "d_denom"),
}
"""What optimisers keep in their groups and no recipe says."""

_PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""What ReduceLROnPlateau has counted; the rest of its state is the recipe's."""

_SAME_STATE = {"adamw_torch", "adamw_torch_fused"}
"""Values of `training.optim` whose states mean the same."""


def facts_of_optimisation(args: TrainingArguments) -> dict[str, Any]:
    """What a checkpoint must say of its optimiser, to be resumed under another recipe.

    `optimizer` is None where its state is not saved.
    """
    optimizer = None if args.save_only_model else _name(args)
    return {"optimizer": optimizer, "learning_rate": args.learning_rate}


def restore(
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    checkpoint: Path,
    args: TrainingArguments,
    step: int,
) -> str | None:
    """Puts a new optimiser and a new schedule to where those of a whole checkpoint stood.

    Args:
        step: of the optimiser, at which the checkpoint was written.

    Returns: what to say where the moments cannot be taken over and start from zero.
    """
    facts = read_seal(checkpoint)
    before = facts["optimizer"]
    scale = args.learning_rate / facts["learning_rate"]
    if before is None:
        restore_schedule(schedule, {}, [], step, scale)
        return (
            "the optimiser's moments start from zero, and the schedule continues at step "
            f"{step}: {checkpoint.name} was saved without them (training.save_only_model)"
        )
    files = (checkpoint / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME))
    state, saved = (torch.load(f, map_location="cpu", weights_only=True) for f in files)
    groups, saved_groups = optimizer.param_groups, state["param_groups"]
    sizes = [[len(group["params"]) for group in own] for own in (groups, saved_groups)]
    now = _name(args)
    if not (before == now or {before, now} <= _SAME_STATE) or sizes[0] != sizes[1]:
        restore_schedule(schedule, saved, [], step, scale)
        return (
            f"the optimiser's moments start from zero, and the schedule continues at step {step}: "
            "the optimiser is another one, or its parameters are in other groups"
        )
    rates = [group["lr"] for group in saved_groups]
    # Moments are the checkpoint's; learning rates, weight decay, betas and so on stay.
    fresh = [{k: v for k, v in group.items() if k not in _STATE} for group in groups]
    optimizer.load_state_dict(_spread(state, optimizer))
    for group, values in zip(optimizer.param_groups, fresh, strict=True):
        group.update(values)
    restore_schedule(schedule, saved, rates, step, scale)
    return None


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors; all processes must ask for it."""
    saved = optimizer.state_dict()
    saved["state"] = {
        index: {
            key: whole(value).cpu() if isinstance(value, torch.Tensor) else value
            for key, value in values.items()
        }
        for index, values in saved["state"].items()
    }
    return saved


def _spread(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state, whose tensors are spread over processes as their parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter, values in ((parameters[i], own) for i, own in saved["state"].items()):
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[key] = spread_like(parameter, value)
    return saved


def _name(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def restore_schedule(
    schedule: Any, saved: dict[str, Any], saved_rates: list[float], step: int, scale: float
) -> None:
    """Puts a new schedule to where a saved one stood.

    A schedule that is a function of the step has, from here on, the rate that a run of its recipe
    has at that step. One that goes by evaluations keeps what it has counted, and the share of the
    learning rate that it has come down to.

    Args:
        schedule: as the recipe makes it; sets the rates of its optimiser.
        saved: the state of the saved schedule; empty where there is none.
        saved_rates: the learning rates that were in force, by group; empty where there are none.
        step: of the optimiser.
        scale: the recipe's learning rate as a multiple of the one that the saved state was made by.
    """
    optimizer = schedule.optimizer
    if isinstance(schedule, LambdaLR):
        # Behind `step` where steps were skipped, as GradScaler does.
        at = saved["last_epoch"] if "lr_lambdas" in saved else step
        schedule.last_epoch, schedule._step_count = at, at + 1
        pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        rates = [base * multiplier(at) for base, multiplier in pairs]
    else:
        own = schedule.state_dict()
        if own.keys() != saved.keys() or not saved_rates:
            return  # another kind before: it begins here
        kept = _PLATEAU if "num_bad_epochs" in own else own
        schedule.load_state_dict({**own, **{key: saved[key] for key in kept}})
        rates = [rate * scale for rate in saved_rates]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
