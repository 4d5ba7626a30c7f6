"""Which configurations cannot share a batch, and why."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainingArguments

from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import LoraEmbedding, LoraLinear, LoraQuantizedLinear, layer_class
from lorakit.lora.targets import resolve_targets
from lorakit.models.inside import base_model, has_dropout
from lorakit.training.recipe import Recipe

_SHARE_BATCHES = (LoraLinear, LoraQuantizedLinear, LoraEmbedding)


def why_alone(
    base: nn.Module, recipe: Recipe, config: LoraConfig, args: TrainingArguments
) -> str | None:
    """Why this configuration has to train by itself; None where it can share a batch.

    Raises:
        InputError: the configuration matches nothing in the model.
    """
    return (
        _draws_itself(base)
        or _changes_more(config)
        or evaluates_itself(recipe, args)
        or _needs_its_own_process(args)
        or _adapts_other_modules(base, config)
    )


def _draws_itself(base: nn.Module) -> str | None:
    """Dropout of the base model is drawn for a whole batch, and so differently in a shared one."""
    return "the base model has dropout of its own" if has_dropout(base) else None


def _changes_more(config: LoraConfig) -> str | None:
    """What an adapter changes or trains beside its own factors."""
    if config.init.kind.changes_base:
        return f"init_lora_weights={config.init_lora_weights} quantises the base"
    if config.init.kind.collect:
        return f"init_lora_weights={config.init_lora_weights} starts from data"
    if config.bias != "none":
        return f"bias={config.bias} trains biases of the base"
    names = "modules_to_save", "trainable_token_indices", "target_parameters"
    for name in (*names, "layer_replication", "ensure_weight_tying"):
        if getattr(config, name):
            return f"it sets {name}"
    return None


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


def _needs_its_own_process(args: TrainingArguments) -> str | None:
    """What reaches beyond an adapter's own parameters while it trains."""
    if args.neftune_noise_alpha:
        return "neftune_noise_alpha draws noise for a whole batch"
    if args.report_to:
        return f"{args.report_to[0]} follows one run of a process at a time"
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        return "use_reentrant computes again without knowing whose rows they are"
    return None


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))


def _adapts_other_modules(base: nn.Module, config: LoraConfig) -> str | None:
    """Modules that do not get all positions of the batch, or are no linear layer or embedding."""
    get_head = getattr(base_model(base), "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    for path in resolve_targets(base, config):
        module = base.get_submodule(path)
        if module is head:
            return f"it adapts the output layer {path}"
        kind = layer_class(module)
        if kind is None or not issubclass(kind, _SHARE_BATCHES):
            return f"it adapts {path}, a {type(module).__name__}"
    return None
