"""Whether and how a run is resumed, and what `--continue` makes of a recipe key that has changed.

A change takes effect from the step at which the run is resumed, or is refused by name, or changes
nothing of the adapter. A key that the table lacks is refused until it is placed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit.errors import InputError, listed
from lorakit.training.checkpoints import Found, read_seal
from lorakit.training.differences import Difference
from lorakit.training.position import place_at, planned_steps

if TYPE_CHECKING:
    from lorakit.training.setup import Setup

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


_TABLE: Mapping[Change, Mapping[str, str]] = {
    _TAKES_EFFECT: {
        "": """
            dtype quantization early_stopping_patience processes template chat_template data rewards
            environment
        """,
        "data.": "train eval max_length too_long columns limit padding_free share_prefixes packing",
        "lora.": "lora_alpha lora_dropout use_rslora alpha_pattern",
        "training.": """
            num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
            learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
            optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
            max_grad_norm loraplus_lr_ratio label_smoothing_factor neftune_noise_alpha
            eval_strategy eval_steps eval_delay
            load_best_model_at_end metric_for_best_model greater_is_better
            tf32 use_cpu full_determinism fsdp fsdp_config
        """,
    },
    _WITHOUT: {
        "": "compile samples output_dir eval",
        "data.": "media_dir fetch_images image_features_mb",
        "lora.": "runtime_config auto_mapping peft_version",
        "training.": """
            eval_on_start per_device_eval_batch_size
            activation_checkpointing activation_checkpointing_kwargs
            gradient_checkpointing gradient_checkpointing_kwargs torch_empty_cache_steps
            logging_strategy logging_steps logging_first_step
            log_level log_level_replica log_on_each_node report_to run_name project
            trackio_space_id trackio_bucket_id trackio_static_space_id
            save_strategy save_steps save_total_limit save_only_model
            dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
            dataloader_persistent_workers dataloader_multiprocessing_context
            ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
            ddp_static_graph ddp_backend ddp_timeout
        """,
    },
    _refused("the adapter belongs to its base model"): {"": "model base"},
    _refused("it decides what is learned"): {"": "objective"},
    _refused("the run has started from it"): {"": "adapter parent"},
    _refused("it has decided how the adapter began, or which rows are held out"): {
        "data.": "seed",
        "training.": "seed",
    },
    _refused("it decides in which order rows come, and where the run is among them"): {
        "data.": "streaming buffer_size",
    },
    _refused("it decides the shapes of the adapter's tensors (see lorakit resize)"): {"lora.": "r"},
    _refused("it decides which tensors the adapter has"): {
        "": "tokens",
        "lora.": """
            peft_type target_modules parts exclude_modules fan_in_fan_out bias modules_to_save
            layers_to_transform layers_pattern rank_pattern task_type use_dora lora_bias
            trainable_token_indices target_parameters layer_replication ensure_weight_tying
        """,
    },
    _refused("it decides how the adapter began"): {
        "lora.": "init_lora_weights loftq_config eva_config corda_config lora_ga_config",
    },
    _refused("lorakit does not have this method"): {
        "lora.": """
            megatron_config megatron_core use_qalora qalora_group_size alora_invocation_tokens
            arrow_config use_bdlora velora_config monteclora_config kasa_config
        """,
    },
    _refused("its checkpoints have a form of their own"): {"training.": "deepspeed"},
}

CHANGES: Mapping[str, Change] = {
    f"{section}{name}": change
    for change, sections in _TABLE.items()
    for section, names in sections.items()
    for name in names.split()
}
"""By key; `data`, `base`, `template`, `rewards`, `environment` and `processes` decide a run too,
and are no keys of a recipe."""

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

_SPLIT = {"data", "data.train", "data.limit", "data.columns"}
"""What changes which rows are held out, where a share of them is."""

_EVALUATION = _SPLIT | {"data.eval", "data.max_length", "data.too_long", "template"}
_EVALUATION |= {"training.metric_for_best_model", "training.greater_is_better", "eval"}
_EVALUATION |= {"rewards", "environment"}
"""What makes held-out losses before and after incomparable."""

_BATCHES = _SPLIT | {"data.max_length", "data.too_long", "data.padding_free", "data.packing"}
_BATCHES |= {"template", "processes", "training.per_device_train_batch_size"}
_BATCHES |= {"training.gradient_accumulation_steps"}
"""What puts the rows of the epoch that was begun into other batches."""


def _named(key: str) -> str:
    """The key of the table that a dotted key is or lies below: `data.columns` of one column."""
    parts = key.split(".")
    return next((name for name in (".".join(parts[:2]), parts[0]) if name in CHANGES), key)


def change_of(key: str) -> Change:
    """What becomes of another value of a dotted key."""
    return CHANGES.get(_named(key)) or _refused("this lorakit does not know what changing it does")


def takes_effect(keys: Iterable[str]) -> bool:
    """Whether one of these keys changes the adapter."""
    return any(change_of(key).effect == "effect" for key in keys)


def changes_evaluation(keys: Iterable[str]) -> bool:
    """Whether held-out losses from here on cannot be compared with those before."""
    return any(_named(key) in _EVALUATION for key in keys)


def refuse(changes: Sequence[Difference], recipe: Mapping[str, Any], folder: Path) -> None:
    """Raises InputError where one of the changes cannot take effect, and says why."""
    found = [
        f"{change.line}, and {why}"
        for change in changes
        if (why := change_of(change.key).why or _misfit(change, recipe))
    ]
    if found:
        raise InputError(
            f"the run in {folder} cannot be continued with these values: {listed(found, 4)}. "
            "Give the same ones, or another folder"
        )


def _misfit(change: Difference, recipe: Mapping[str, Any]) -> str | None:
    """Why this very value cannot take effect."""
    name, value = _named(change.key), change.now
    if name in _OPTIMISATION and recipe["training"].get("deepspeed"):
        return "DeepSpeed takes it from the checkpoint"
    if name == "data.eval" and isinstance(value, (int, float)) and value:
        return (
            "rows that were learned would be held out: give the file of rows that were never "
            "learned, or 0"
        )
    return None


def check_resume(
    setup: Setup, found: Found, changes: Sequence[Difference], *, finished: bool
) -> list[str]:
    """What a user should know of how a run is resumed.

    Args:
        found: what it is resumed from.
        changes: since it was written.
        finished: the run had come to its end.

    Raises:
        InputError: it cannot be resumed from there, or not with these changes.
    """
    folder = Path(setup.recipe.output_dir)
    refuse(changes, setup.recipe.to_dict(), folder)
    if found.checkpoint is None:
        if found.damaged:
            raise InputError(
                f"none of the checkpoints in {folder} can be used: {listed(found.damaged, 4)}. "
                "Remove them to start again with the same command, or give another folder"
            )
        if finished and changes:
            raise InputError(
                f"{folder} holds a finished run without a checkpoint (training.save_strategy=no): "
                "there is nothing to continue from; give another folder"
            )
        return []
    args, keys = setup.arguments, [change.key for change in changes]
    batches = len(setup.batching.train_batches(setup.data.train, args, epoch=0))
    place = place_at(found.checkpoint, args, batches)
    steps = planned_steps(args, batches, place)
    cure = "raise training." + ("max_steps" if args.max_steps > 0 else "num_train_epochs")
    if found.step > steps:
        raise InputError(
            f"the run in {folder} is at step {found.step}, past its end at step {steps} as "
            f"the recipe is now: {cure}, or give another folder"
        )
    idle = [key for key in keys if takes_effect([key]) and _named(key) not in _WITHOUT_STEPS]
    if found.step == steps and idle:
        raise InputError(
            f"the run in {folder} is at its last step, {steps}, and no step is left in which "
            f"{listed(idle, 4)} would take effect: {cure}, or give another folder"
        )
    named, share, notices = {_named(key) for key in keys}, setup.recipe.data.eval, []
    if named & _SPLIT and isinstance(share, float) and share:
        notices.append(
            f"{share:.0%} of the changed rows are held out, some of which may have been learned "
            "before: their loss may be too good; give data.eval a file of its own"
        )
    if place.batches and named & _BATCHES and setup.data.stream is None:
        notices.append(
            f"epoch {place.epoch + 1} is resumed at "
            f"{place.batches * args.world_size / batches:.0%} in other batches: where its rows are "
            "in another order now, some come twice or not at all in it"
        )
    return notices


def missing_state(found: Found, *, accept_changes: bool) -> list[str]:
    """What a checkpoint lacks that an undisturbed run has; an error unless that is accepted."""
    if found.checkpoint is None or read_seal(found.checkpoint)["optimizer"] is not None:
        return []
    lacking = (
        f"{found.checkpoint.name} was saved without the state of optimiser and random numbers "
        "(training.save_only_model)"
    )
    if not accept_changes:
        raise InputError(
            f"{lacking}: with --resume the result would not be that of an undisturbed run; "
            "--continue resumes with new moments, at the same step of the schedule"
        )
    return [lacking]
