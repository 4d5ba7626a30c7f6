"""What `--continue` makes of every recipe key that has another value: the one table of them.

A change takes effect from the step at which the run goes on, or is refused by name, or changes
nothing of the adapter. A key that the table lacks is refused until it is placed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorakit.errors import InputError, listed
from lorakit.training.differences import Difference

Effect = Literal["effect", "refused", "without effect"]


@dataclass(frozen=True)
class Change:
    """What becomes of another value of a recipe key.

    Attributes:
        effect: on the adapter.
        why: it is refused.
    """

    effect: Effect
    why: str = ""


_TAKES_EFFECT = Change("effect")
_WITHOUT = Change("without effect")


def _refused(why: str) -> Change:
    return Change("refused", why)


_SHAPE = _refused("it decides which tensors the adapter has")
_BEGAN = _refused("it decides how the adapter began")
_BASE = _refused("the adapter belongs to its base model")
_SEED = _refused("it has decided how the adapter began, or which rows are held out")

CHANGES: Mapping[str, Change] = {
    # --- what the run is of
    "model": _BASE,
    "base": _BASE,  # its weights
    "dtype": _TAKES_EFFECT,
    "quantization": _TAKES_EFFECT,
    "compile": _WITHOUT,
    "samples": _WITHOUT,
    "output_dir": _WITHOUT,
    "early_stopping_patience": _TAKES_EFFECT,
    "processes": _TAKES_EFFECT,
    "template": _TAKES_EFFECT,  # the chat template
    # --- rows
    "data": _TAKES_EFFECT,  # what the files hold
    "data.train": _TAKES_EFFECT,
    "data.eval": _TAKES_EFFECT,
    "data.max_length": _TAKES_EFFECT,
    "data.too_long": _TAKES_EFFECT,
    "data.columns": _TAKES_EFFECT,
    "data.limit": _TAKES_EFFECT,
    "data.seed": _SEED,
    "data.padding_free": _TAKES_EFFECT,
    "data.share_prefixes": _TAKES_EFFECT,
    "data.packing": _TAKES_EFFECT,
    # --- the adapter
    "objective": _TAKES_EFFECT,
    "lora.peft_type": _SHAPE,
    "lora.r": _refused("it decides the shapes of the adapter's tensors (see lorakit resize)"),
    "lora.target_modules": _SHAPE,
    "lora.exclude_modules": _SHAPE,
    "lora.lora_alpha": _TAKES_EFFECT,
    "lora.lora_dropout": _TAKES_EFFECT,
    "lora.fan_in_fan_out": _SHAPE,
    "lora.bias": _SHAPE,
    "lora.use_rslora": _TAKES_EFFECT,
    "lora.modules_to_save": _SHAPE,
    "lora.init_lora_weights": _BEGAN,
    "lora.layers_to_transform": _SHAPE,
    "lora.layers_pattern": _SHAPE,
    "lora.rank_pattern": _SHAPE,
    "lora.alpha_pattern": _TAKES_EFFECT,
    "lora.task_type": _SHAPE,
    "lora.use_dora": _SHAPE,
    "lora.lora_bias": _SHAPE,
    "lora.trainable_token_indices": _SHAPE,
    "lora.target_parameters": _SHAPE,
    "lora.layer_replication": _SHAPE,
    "lora.ensure_weight_tying": _SHAPE,
    "lora.loftq_config": _BEGAN,
    "lora.eva_config": _BEGAN,
    "lora.corda_config": _BEGAN,
    "lora.lora_ga_config": _BEGAN,
    "lora.runtime_config": _WITHOUT,
    "lora.auto_mapping": _WITHOUT,
    "lora.peft_version": _WITHOUT,
    **{
        f"lora.{name}": _refused("lorakit does not have this method")
        for name in (
            *("megatron_config", "megatron_core", "use_qalora", "qalora_group_size"),
            *("alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config"),
            *("monteclora_config", "kasa_config"),
        )
    },
    # --- duration and batches
    "training.num_train_epochs": _TAKES_EFFECT,
    "training.max_steps": _TAKES_EFFECT,
    "training.per_device_train_batch_size": _TAKES_EFFECT,
    "training.gradient_accumulation_steps": _TAKES_EFFECT,
    # --- schedule and optimiser
    "training.learning_rate": _TAKES_EFFECT,
    "training.lr_scheduler_type": _TAKES_EFFECT,
    "training.lr_scheduler_kwargs": _TAKES_EFFECT,
    "training.warmup_steps": _TAKES_EFFECT,
    "training.optim": _TAKES_EFFECT,
    "training.optim_args": _TAKES_EFFECT,
    "training.weight_decay": _TAKES_EFFECT,
    "training.adam_beta1": _TAKES_EFFECT,
    "training.adam_beta2": _TAKES_EFFECT,
    "training.adam_epsilon": _TAKES_EFFECT,
    "training.max_grad_norm": _TAKES_EFFECT,
    "training.loraplus_lr_ratio": _TAKES_EFFECT,
    # --- the loss and the model's input
    "training.label_smoothing_factor": _TAKES_EFFECT,
    "training.neftune_noise_alpha": _TAKES_EFFECT,
    "training.seed": _SEED,
    # --- which weights are left
    "training.eval_strategy": _TAKES_EFFECT,
    "training.eval_steps": _TAKES_EFFECT,
    "training.eval_delay": _TAKES_EFFECT,
    "training.eval_on_start": _WITHOUT,
    "training.load_best_model_at_end": _TAKES_EFFECT,
    "training.metric_for_best_model": _TAKES_EFFECT,
    "training.greater_is_better": _TAKES_EFFECT,
    # --- where it is computed
    "training.tf32": _TAKES_EFFECT,
    "training.use_cpu": _TAKES_EFFECT,
    "training.full_determinism": _TAKES_EFFECT,
    "training.fsdp": _TAKES_EFFECT,
    "training.fsdp_config": _TAKES_EFFECT,
    "training.deepspeed": _refused("its checkpoints have a form of their own"),
    **{
        f"training.{name}": _WITHOUT
        for name in (
            "per_device_eval_batch_size",
            "activation_checkpointing",
            "activation_checkpointing_kwargs",
            "gradient_checkpointing",
            "gradient_checkpointing_kwargs",
            "torch_empty_cache_steps",
            *("logging_strategy", "logging_steps", "logging_first_step"),
            *("log_level", "log_level_replica", "log_on_each_node"),
            *("report_to", "run_name", "project"),
            *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
            *("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
            *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
            *("dataloader_persistent_workers", "dataloader_multiprocessing_context"),
            *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
            *("ddp_static_graph", "ddp_backend", "ddp_timeout"),
        )
    },
}
"""By key; `data`, `base`, `template` and `processes` are no recipe keys, but decide a run too."""

_WITHOUT_STEPS = {"lora.lora_alpha", "lora.use_rslora", "lora.alpha_pattern", "dtype"}
"""What changes the adapter, or its scores, with no step to come."""

_OPTIMISATION = {
    f"training.{name}"
    for name in (
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
        *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        "loraplus_lr_ratio",
    )
}

_EVALUATION = {
    *(
        "data",
        "data.train",
        "data.eval",
        "data.max_length",
        "data.columns",
        "data.limit",
        "data.too_long",
    ),
    *("template", "training.metric_for_best_model", "training.greater_is_better"),
}
"""What makes held-out losses before and after incomparable."""

_SPLIT = {"data", "data.train", "data.limit", "data.columns"}
"""What changes which rows are held out, where a share of them is."""


_BATCHES = _SPLIT | {
    *("data.max_length", "data.too_long", "data.padding_free", "data.packing"),
    *("template", "processes"),
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
}


def change_of(key: str) -> Change:
    """What becomes of another value of a dotted key; of a key inside a value, such as
    `data.columns.prompt`, what becomes of the value."""
    parts = key.split(".")
    for name in (".".join(parts[:2]), parts[0]):
        if name in CHANGES:
            return CHANGES[name]
    return _refused("this lorakit does not know what changing it does")


def takes_effect(keys: Iterable[str]) -> bool:
    """Whether one of these keys changes the adapter."""
    return any(change_of(key).effect == "effect" for key in keys)


def needs_steps(keys: Iterable[str]) -> list[str]:
    """Those of the keys that change the adapter only by steps that are still to come."""
    return [key for key in keys if takes_effect([key]) and _named(key) not in _WITHOUT_STEPS]


def changes_evaluation(keys: Iterable[str]) -> bool:
    """Whether held-out losses from here on cannot be compared with those before."""
    return any(_named(key) in _EVALUATION for key in keys)


def changes_batches(keys: Iterable[str]) -> bool:
    """Whether the rows of the epoch that was begun come in other batches from here on."""
    return any(_named(key) in _BATCHES for key in keys)


def notices(keys: Iterable[str], recipe: Mapping[str, Any]) -> list[str]:
    """What a user should know of changes of these keys, beside that they were made."""
    share = recipe["data"]["eval"]
    if _SPLIT & {_named(key) for key in keys} and isinstance(share, float) and share:
        return [
            f"{share:.0%} of the changed rows are held out, some of which may have been learned "
            "before: their loss may be too good; give data.eval a file of its own"
        ]
    return []


def refuse(changes: Sequence[Difference], recipe: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError where one of the changes cannot take effect, and says why."""
    found = []
    for change in changes:
        why = change_of(change.key).why or _misfit(change, recipe)
        if why:
            found.append(f"{change.line}, and {why}")
    if found:
        raise InputError(
            f"the run in {folder} cannot be continued with these values: {listed(found, 4)}. "
            "Give the same ones, or another folder"
        )


def _misfit(change: Difference, recipe: Mapping[str, Any]) -> str | None:
    """Why this very value cannot take effect."""
    name = _named(change.key)
    if name in _OPTIMISATION and recipe["training"].get("deepspeed"):
        return "DeepSpeed takes it from the checkpoint"
    share = change.now
    if name == "data.eval" and isinstance(share, (int, float)) and share:
        return (
            "rows that were learned would be held out: give the file of rows that were never "
            "learned, or 0"
        )
    return None


def _named(key: str) -> str:
    two = ".".join(key.split(".")[:2])
    return two if two in CHANGES else key.split(".")[0]
