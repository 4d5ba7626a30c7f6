"""Weights that FSDP2 spreads over processes: when that is asked for, and how it is switched on.

Sharding itself is accelerate's work, in the units that transformers names as never split.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, parse_flag_from_env

from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from lorakit.lora.config import LoraConfig


def asks_for_fsdp(arguments: TrainingArguments) -> bool:
    """Whether the recipe, or accelerate's own configuration, wants weights spread by FSDP."""
    return bool(arguments.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


def asks_to_spread(training: dict[str, Any]) -> bool:
    """Whether a recipe's `training` keys, or the environment, ask for FSDP or DeepSpeed."""
    flags = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    by_recipe = training.get("fsdp") or training.get("deepspeed")
    return bool(by_recipe) or any(map(parse_flag_from_env, flags))


def check_fsdp(arguments: TrainingArguments, lora: LoraConfig) -> None:
    """Raises InputError for what FSDP2 cannot do here, or what would not be read."""
    if not asks_for_fsdp(arguments):
        if arguments.fsdp_config:
            raise InputError("training.fsdp_config is read with training.fsdp: true alone: add it")
        return
    if arguments.world_size == 1:
        raise InputError(
            "training.fsdp spreads a model over processes, and this is one: start it with "
            "torchrun --nproc-per-node N -m lorakit train …, or leave training.fsdp out"
        )
    by_recipe = (arguments.fsdp_plugin_args or {}).get("fsdp_version")
    if (by_recipe or int(os.environ.get("FSDP_VERSION", "1"))) != 2:
        raise InputError(
            "FSDP's first version is not supported: set version: 2 in training.fsdp_config, or "
            "give accelerate launch --fsdp_version 2"
        )
    for key, plain in (("bias", "none"), ("layer_replication", None)):
        if (value := getattr(lora, key)) != plain:
            raise InputError(f"lora.{key}: {value!r} cannot be trained with FSDP: leave one out")


def switch_on(accelerator: Accelerator, plugin_args: dict[str, Any] | None) -> None:
    """Lets `accelerator` shard on CPUs too, where it would leave FSDP out without a word.

    Args:
        plugin_args: the recipe's; None takes what `accelerate launch` has set.
    """
    state = accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_args or {})
        state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
