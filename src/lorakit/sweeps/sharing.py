"""Which configurations cannot share a pass with others, and why."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

from lorakit.engine.shared_pass import why_not_shared
from lorakit.lora.config import LoraConfig
from lorakit.models.loaded import has_dropout
from lorakit.training.recipe import Recipe


def why_alone(
    base: nn.Module, recipe: Recipe, config: LoraConfig, args: TrainingArguments
) -> str | None:
    """Why this configuration has to train by itself; None where it can share passes.

    Raises:
        InputError: the configuration matches nothing in the model.
    """
    if has_dropout(base):  # drawn for a whole batch, and so differently in a shared one
        return "the base model has dropout of its own"
    if args.neftune_noise_alpha:
        return "neftune_noise_alpha draws noise for a whole batch"
    if args.report_to:
        return f"{args.report_to[0]} follows one run of a process at a time"
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        return "use_reentrant recomputes without the route of a shared pass"
    return evaluates_itself(recipe, args) or why_not_shared(base, config)


def evaluates_itself(recipe: Recipe, args: TrainingArguments) -> str | None:
    """What a run does by evaluations of its own, if there is anything."""
    if recipe.early_stopping_patience or args.load_best_model_at_end:
        return "it keeps its best weights by evaluations of its own"
    if args.eval_on_start:
        return "it evaluates before it begins"
    if _name(args.save_strategy) == "best":
        return "it saves by evaluations of its own"
    if (schedule := _name(args.lr_scheduler_type)) in ("reduce_lr_on_plateau", "greedy"):
        return f"the schedule {schedule} goes by evaluations of its own"
    return None


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))
