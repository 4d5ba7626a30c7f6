"""What lorakit does with every field of `TrainingArguments`: the one table of them.

A field is honoured, reserved (lorakit sets it) or refused (it would have no effect here). The
table is printed into docs/training-arguments.md by `python -m lorakit.training.arguments`, and a
field of a newer transformers that it lacks is refused until it is placed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Treatment = Literal["honoured", "reserved", "refused"]


@dataclass(frozen=True)
class Argument:
    """How a field of `TrainingArguments` is treated.

    Attributes:
        note: honoured: what should be known here beside transformers' own description; reserved:
            what to use instead; refused: why it has no effect, or what does its work here.
        inert: values of a reserved or refused field that say what happens anyway; they are
            accepted, so that a configuration of another script can be taken over.
    """

    treatment: Treatment
    note: str = ""
    inert: tuple[Any, ...] = ()


def _honoured(note: str = "") -> Argument:
    return Argument("honoured", note)


def _reserved(note: str, *inert: Any) -> Argument:
    return Argument("reserved", note, inert)


def _refused(note: str, *inert: Any) -> Argument:
    return Argument("refused", note, inert)


_SUMS = "an evaluation keeps sums of the loss and of a classifier's counts, never predictions"
_HUB = "lorakit push, when the run has ended"
_COMPILE = "compile at the top of the recipe"
_FULL_EVAL = "held-out rows are evaluated in the model's own dtype (dtype at the top of the recipe)"
_WORKERS = "needs `dataloader_num_workers` above 0"
_TRACKIO = "needs `report_to` with `trackio`"
_BEST = "needs `load_best_model_at_end`, `save_strategy: best`, `early_stopping_patience` or a "
_BEST += "schedule that goes by evaluations"
_DDP = "of several processes; with one process a notice says that it has no effect"
_LIKE_LENGTHS = "rows are shuffled by training.seed; where they are padded, those of like length "
_LIKE_LENGTHS += "share a batch"

ARGUMENTS: Mapping[str, Argument] = {
    # --- duration and batches
    "output_dir": _reserved("output_dir at the top of the recipe"),
    "per_device_train_batch_size": _honoured("rows of a batch; with `data.packing` times "
                                             "`data.max_length` tokens"),
    "num_train_epochs": _honoured(),
    "max_steps": _honoured("overrides `num_train_epochs`"),
    "gradient_accumulation_steps": _honoured("the loss is divided by the supervised tokens of "
                                             "the whole step"),
    "average_tokens_across_devices": _reserved("nothing: the loss is always that of all "
                                               "processes' tokens", True),
    "auto_find_batch_size": _reserved("training.per_device_train_batch_size", False),
    # --- schedule
    "learning_rate": _honoured("chosen by the model's size where it is left out"),
    "lr_scheduler_type": _honoured("all of transformers' schedules"),
    "lr_scheduler_kwargs": _honoured("tried before training begins"),
    "warmup_steps": _honoured("the warm-up begins above 0: step k of w has (k + 1) / w of the "
                              "rate, where transformers has k / w"),
    # --- optimiser
    "optim": _honoured("GaLore and APOLLO project the gradients of full matrices and are refused, "
                       "as is what the machine lacks a package for"),
    "optim_args": _honoured("refused where the optimiser reads none"),
    "optim_target_modules": _refused("it is for GaLore and APOLLO, which train full matrices: "
                                     "lora.target_modules says what is adapted"),
    "weight_decay": _honoured(),
    "adam_beta1": _honoured("refused where the optimiser has none"),
    "adam_beta2": _honoured("refused where the optimiser has none"),
    "adam_epsilon": _honoured("refused where the optimiser has none"),
    "max_grad_norm": _honoured("0 clips nothing"),
    # --- the loss and the model's input
    "label_smoothing_factor": _honoured("of the loss that is trained, per supervised token; the "
                                        "held-out loss stays the plain one"),
    "neftune_noise_alpha": _honoured("noise of alpha / sqrt(tokens of the row x width) for each "
                                     "row, padded or in a line; prefixes are not shared then"),
    # --- precision and speed
    "bf16": _reserved("dtype at the top of the recipe"),
    "fp16": _reserved("dtype at the top of the recipe"),
    "bf16_full_eval": _refused(_FULL_EVAL, False),
    "fp16_full_eval": _refused(_FULL_EVAL, False),
    "tf32": _honoured("of GPUs; true is refused where there is none that has it"),
    "activation_checkpointing": _honoured(),
    "activation_checkpointing_kwargs": _honoured("needs `activation_checkpointing`"),
    "gradient_checkpointing": _honoured("the older name of `activation_checkpointing`"),
    "gradient_checkpointing_kwargs": _honoured("the older name of "
                                               "`activation_checkpointing_kwargs`"),
    "torch_compile": _reserved(_COMPILE),
    "torch_compile_backend": _reserved(_COMPILE),
    "torch_compile_mode": _reserved(_COMPILE),
    "use_liger_kernel": _refused("lorakit has its own fused norms, MLPs and chunked "
                                 "cross-entropy, and uses them always", False),
    "liger_kernel_config": _refused("lorakit has its own fused norms, MLPs and cross-entropy"),
    "use_cache": _refused("training has no use for a cache of keys and values", False),
    "torch_empty_cache_steps": _honoured(),
    "use_cpu": _honoured("true trains on the CPU beside a GPU too"),
    "full_determinism": _honoured("sets PyTorch's deterministic algorithms for the process"),
    # --- randomness and order
    "seed": _honoured("of the adapter's start, of dropout and of the order of rows"),
    "data_seed": _reserved("training.seed (the order of rows) or data.seed (which are held out)"),
    "train_sampling_strategy": _reserved(f"nothing: {_LIKE_LENGTHS}", "random"),
    "length_column_name": _refused("lengths are those of the tokenised rows", "length"),
    # --- evaluation
    "eval_strategy": _honoured("`epoch` where it is left out; nothing is evaluated without "
                               "held-out rows"),
    "eval_steps": _honoured("needs `eval_strategy: steps`"),
    "eval_delay": _honoured("needs an `eval_strategy` other than `no`"),
    "eval_on_start": _honoured("needs held-out rows"),
    "per_device_eval_batch_size": _honoured("as many rows as a pass takes well where it is left "
                                            "out"),
    "do_train": _refused("lorakit train trains; lorakit eval evaluates an adapter", True),
    "do_eval": _refused("use training.eval_strategy, and data.eval: 0 to hold no rows out"),
    "do_predict": _refused("lorakit generate answers a file of prompts with the adapter", False),
    "prediction_loss_only": _refused(_SUMS),
    "eval_do_concat_batches": _refused(_SUMS),
    "eval_use_gather_object": _refused(_SUMS, False),
    "eval_accumulation_steps": _refused(_SUMS),
    "include_for_metrics": _refused(_SUMS, []),
    "batch_eval_metrics": _refused(_SUMS, False),
    "label_names": _refused("the labels are those that lorakit makes of the rows"),
    # --- the best model
    "load_best_model_at_end": _honoured("saves whenever it evaluates, unless `save_strategy` or "
                                        "`save_steps` say otherwise; needs held-out rows"),
    "metric_for_best_model": _honoured(f"`loss`, and a classifier's scores; {_BEST}"),
    "greater_is_better": _honoured("must be true of the metric: false for `loss`, true for a "
                                   "classifier's scores"),
    # --- logging
    "logging_strategy": _honoured(),
    "logging_steps": _honoured("how often `monitor.jsonl` is written too"),
    "logging_first_step": _honoured(),
    "logging_nan_inf_filter": _reserved("nothing: a loss that is NaN or Inf ends the run", False),
    "include_num_input_tokens_seen": _refused("the tokens are always counted: see metrics.jsonl "
                                              "and lorakit.json", "no", False),
    "log_level": _honoured("of transformers' own messages"),
    "log_level_replica": _honoured("of transformers' own messages in the other processes"),
    "log_on_each_node": _honoured("which processes have `log_level`"),
    "disable_tqdm": _refused("lorakit shows its own progress, and lines where the output is not "
                             "a terminal", True),
    "report_to": _honoured("`none` where it is left out; a tracker that is not installed is "
                           "refused"),
    "run_name": _honoured("needs `report_to`"),
    "project": _honoured(_TRACKIO),
    "trackio_space_id": _honoured(_TRACKIO),
    "trackio_bucket_id": _honoured(_TRACKIO),
    "trackio_static_space_id": _honoured(_TRACKIO),
    "skip_memory_metrics": _refused("the peak of memory is always recorded in lorakit.json", True),
    "debug": _refused("a loss or gradient that is NaN or Inf ends the run and names the causes",
                      "", []),
    # --- saving and resuming
    "save_strategy": _honoured(),
    "save_steps": _honoured("needs `save_strategy: steps`"),
    "save_total_limit": _honoured(),
    "save_only_model": _honoured("such a checkpoint has no optimiser to resume with"),
    "save_on_each_node": _refused("all machines of a run write to one output folder", False),
    "enable_jit_checkpoint": _refused("SIGTERM always finishes the step and saves", False),
    "resume_from_checkpoint": _reserved("--resume", False),
    "ignore_data_skip": _refused("a resumed run always goes on with the rows that come next",
                                 False),
    "restore_callback_states_from_checkpoint": _refused(
        "what lorakit's callbacks know is taken from the checkpoint always"
    ),
    # --- the hub
    "push_to_hub": _reserved(_HUB, False),
    "hub_token": _reserved(_HUB),
    "hub_private_repo": _reserved(_HUB),
    "hub_model_id": _reserved(_HUB),
    "hub_strategy": _reserved(_HUB, "every_save"),
    "hub_always_push": _reserved(_HUB, False),
    "hub_revision": _reserved(_HUB),
    # --- loading of batches
    "dataloader_drop_last": _reserved("nothing: every row is learned", False),
    "dataloader_num_workers": _honoured(),
    "dataloader_pin_memory": _honoured("true where there is a GPU and it is left out"),
    "dataloader_persistent_workers": _honoured(_WORKERS),
    "dataloader_prefetch_factor": _honoured(_WORKERS),
    "dataloader_multiprocessing_context": _honoured(_WORKERS),
    "dataloader_in_order": _refused("batches always come in the order that a resumed run and "
                                    "lorakit reproduce repeat", True),
    "remove_unused_columns": _reserved("nothing: the trainer builds its own batches", False),
    # --- several processes
    "ddp_find_unused_parameters": _honoured(_DDP),
    "ddp_bucket_cap_mb": _honoured(_DDP),
    "ddp_broadcast_buffers": _honoured(_DDP),
    "ddp_static_graph": _honoured(_DDP),
    "ddp_backend": _honoured(_DDP),
    "ddp_timeout": _honoured(_DDP),
    "fsdp": _honoured("FSDP's second version; see scaling.md"),
    "fsdp_config": _honoured("needs `fsdp`"),
    "deepspeed": _honoured("stages 1 and 2; see scaling.md"),
    "accelerator_config": _refused("lorakit divides batches over processes itself"),
    "parallelism_config": _refused("a run is spread by training.fsdp or training.deepspeed"),
    "local_rank": _refused("torchrun and accelerate launch set it", -1),
}  # fmt: skip
"""Every field of `TrainingArguments` by name, those of transformers 5.23 and before."""


def refusal(name: str, value: Any) -> str | None:
    """Why `training.<name>` cannot be given this value; None where the field is not the reason.

    Args:
        name: a field of `TrainingArguments`, of this transformers or another.
    """
    argument = ARGUMENTS.get(name)
    if argument is None:
        return (
            f"training.{name} is newer than this lorakit, which does not know what it would do: "
            "leave it out"
        )
    if argument.treatment == "honoured" or _says_what_happens(argument, value):
        return None
    if argument.treatment == "reserved":
        return f"training.{name} is not set here: use {argument.note}"
    return f"training.{name} has no effect here: {argument.note}"


def _says_what_happens(argument: Argument, value: Any) -> bool:
    return value is None or any(
        type(value) is type(inert) and value == inert for inert in argument.inert
    )


_HEAD = """\
# Training arguments

Under `training` a recipe has the fields of transformers' `TrainingArguments`, by their own names.
Each is *honoured*, *reserved* (lorakit sets it: giving another value is refused and names what to
use) or *refused* (it would have no effect here). A field that has no effect beside the other
settings of a recipe is refused or noticed too. `loraplus_lr_ratio` is lorakit's own: with it `B`
learns so many times faster than `A` (LoRA+).

The table is made of `lorakit/training/arguments.py` by `python -m lorakit.training.arguments`.

| argument | here | note |
| --- | --- | --- |
"""


def table() -> str:
    """docs/training-arguments.md."""
    lines = [
        f"| `{name}` | {argument.treatment} | {argument.note} |"
        for name, argument in sorted(ARGUMENTS.items())
    ]
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    from lorakit.console import write

    write(table())
