"""What settings of other tools are called here: LLaMA-Factory's, Axolotl's, Unsloth's, TRL's,
ms-swift's, mlx-lm's, and those that transformers had before.

One line a name, which is found wherever it is given. The table is printed into
docs/other-names.md by `python -m lorakit.training.other_names`.
"""

from __future__ import annotations

from collections.abc import Mapping

_LIKE_LENGTHS = "-: where rows are padded, those of like length share a batch"
_NF4 = "quantization=nf4"
_INT8 = "quantization=int8"
_ANSWERS = "-: only the answers are learned"
_ALWAYS = "-: lorakit trains a LoRA adapter always (QLoRA: quantization=nf4)"
_SFT = "-: lorakit learns the answers of its rows (supervised fine-tuning)"
_TEMPLATE = "-: the model's own chat template is used"
_OUTPUT = "-: the output folder must be new, or --resume goes on in it"
_ATTENTION = "-: the attention is chosen by the model and the machine"
_KERNELS = "-: fused norms, MLPs and cross-entropy are always used"
_TOKENIZED = "-: rows are tokenised in one process before training"
_ONGOING = "-: --resume goes on with the run in output_dir"
_HUB = "-: lorakit push uploads the adapter when the run has ended"
_TRUST = "-: the command line has --trust-remote-code"
_WANDB = "-: set the tracker's own environment variables (WANDB_PROJECT …)"
_EACH_EPOCH = "-: a share of all steps, as in training.{} below 1"

# A hint is a key of a recipe, with what to know behind " (", or "-: " and why there is none.
OTHER_NAMES: Mapping[str, str] = {
    # --- the base model
    "base_model": "model",
    "base_model_name": "model",
    "base_model_name_or_path": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "model_id": "model",
    "model_id_or_path": "model",
    "model_path": "model",
    "pretrained_model_name_or_path": "model",
    "model_type": "-: the model's config.json says it",
    "tokenizer_type": "-: the model's folder says it",
    "tokenizer_name": "-: the model's own tokenizer is used",
    "tokenizer_path": "-: the model's own tokenizer is used",
    "model_revision": "-: download the revision and give its folder as model",
    "trust_remote_code": _TRUST,
    "torch_dtype": "dtype",
    "model_dtype": "dtype",
    "lora_dtype": "-: an adapter is trained in float32 beside a base in bfloat16 or float16",
    "pure_bf16": "dtype (=bfloat16)",
    "precision": "dtype",
    "mixed_precision": "dtype",
    "bf16": "dtype (=bfloat16)",
    "fp16": "dtype (=float16)",
    "float16": "dtype (=float16)",
    "bfloat16": "dtype (=bfloat16)",
    "load_in_4bit": f"quantization (true is {_NF4})",
    "load_in_8bit": f"quantization (true is {_INT8})",
    "quantization_bit": f"quantization (4 is {_NF4}, 8 is {_INT8})",
    "quant_bits": f"quantization (4 is {_NF4}, 8 is {_INT8})",
    "quantization_type": "quantization (nf4 or fp4)",
    "quantization_method": f"quantization ({_NF4}: bitsandbytes)",
    "quant_method": f"quantization ({_NF4}: bitsandbytes)",
    "bnb_4bit_quant_type": "quantization (nf4 or fp4)",
    "bnb_4bit_compute_dtype": "dtype",
    "double_quantization": "quantization (a mapping has further keys: docs/quantization.md)",
    "bnb_4bit_use_double_quant": "quantization (a mapping has further keys: docs/quantization.md)",
    "use_bnb_nested_quant": "quantization (a mapping has further keys: docs/quantization.md)",
    "device_map": "-: the model goes to the GPU; training.fsdp spreads it over several",
    "attn_implementation": _ATTENTION,
    "attn_impl": _ATTENTION,
    "flash_attn": _ATTENTION,
    "flash_attention": _ATTENTION,
    "use_flash_attention_2": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "xformers_attention": _ATTENTION,
    "use_unsloth": _KERNELS,
    "use_liger": _KERNELS,
    "enable_liger_kernel": _KERNELS,
    "lora_mlp_kernel": _KERNELS,
    "lora_qkv_kernel": _KERNELS,
    "lora_o_kernel": _KERNELS,
    "rope_scaling": "-: set it in the model's config.json",
    "resize_vocab": "-: lora.trainable_token_indices trains tokens that the model has",
    "special_tokens": "-: add them to the tokenizer's folder before training",
    # --- the rows
    "dataset": "data.train",
    "datasets": "data.train (a list of files, or of {path: …, weight: …})",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "dataset_dir": "data.train (a path to the file or folder)",
    "dataset_name_or_path": "data.train",
    "data_path": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "train_dataset": "data.train",
    "custom_train_dataset_path": "data.train",
    "dataset_train_split": "data.train (a path, or PATH:SPLIT)",
    "eval_dataset": "data.eval",
    "val_dataset": "data.eval",
    "test_datasets": "data.eval",
    "validation_file": "data.eval",
    "eval_file": "data.eval",
    "dataset_test_split": "data.eval (a path, or PATH:SPLIT)",
    "eval_split": "data.eval (a path, PATH:SPLIT, or the share to hold out)",
    "val_size": "data.eval (the share to hold out, below 1, or a file)",
    "val_set_size": "data.eval (the share to hold out, below 1, or a file)",
    "test_size": "data.eval (the share to hold out, below 1, or a file)",
    "validation_split": "data.eval (the share to hold out, below 1, or a file)",
    "split_dataset_ratio": "data.eval (the share to hold out, below 1, or a file)",
    "dataset_test_ratio": "data.eval (the share to hold out, below 1, or a file)",
    "max_samples": "data.limit",
    "max_train_samples": "data.limit",
    "train_dataset_sample": "data.limit",
    "num_samples": "data.limit",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "seq_len": "data.max_length",
    "seq_length": "data.max_length",
    "block_size": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_len": "data.max_length",
    "model_max_length": "data.max_length",
    "max_source_length": "data.max_length (of prompt and answer together)",
    "max_target_length": "data.max_length (of prompt and answer together)",
    "max_prompt_length": "data.max_length (of prompt and answer together)",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing (rows that lie in one line never see each other)",
    "eval_sample_packing": "data.packing (of held-out rows too)",
    "eval_packing": "data.packing (of held-out rows too)",
    "packing_strategy": "data.packing (best fit)",
    "pad_to_sequence_len": "-: rows lie in one line, or are padded to the longest of their batch",
    "pad_to_multiple_of": "-: rows lie in one line, or are padded to the longest of their batch",
    "dataset_text_field": "data.columns (which column is what: see docs/data.md)",
    "prompt_feature": "data.columns (which column is what: see docs/data.md)",
    "completion_feature": "data.columns (which column is what: see docs/data.md)",
    "chat_feature": "data.columns (which column is what: see docs/data.md)",
    "mix_strategy": "data.train (a list of {path: …, weight: …})",
    "interleave_probs": "data.train (a list of {path: …, weight: …})",
    "dataset_shuffle": "-: rows are shuffled by training.seed",
    "shuffle": "-: rows are shuffled by training.seed",
    "random_state": "training.seed",
    "random_seed": "training.seed",
    "streaming": "-: rows are read whole before training",
    "template": _TEMPLATE,
    "template_type": _TEMPLATE,
    "chat_template": _TEMPLATE,
    "chat_template_path": _TEMPLATE,
    "conversation_template": _TEMPLATE,
    "system": "-: give the rows a system message or column",
    "default_system": "-: give the rows a system message or column",
    "truncation_strategy": "data.too_long (cut, drop, split or error; delete is drop)",
    "truncation_mode": "data.too_long (cut, drop, split or error)",
    "truncation": "data.too_long (cut, drop, split or error)",
    "excess_length_strategy": "data.too_long (cut, drop, split or error; truncate is cut)",
    "mask_history": "-: messages say which answers are learned (weight: 0, train: false)",
    "loss_scale": "-: messages say which answers are learned (weight: 0, train: false)",
    "train_on_eos": "-: an answer is learned with its end",
    "train_on_inputs": _ANSWERS,
    "train_on_prompt": _ANSWERS,
    "mask_prompt": _ANSWERS,
    "completion_only_loss": _ANSWERS,
    "assistant_only_loss": _ANSWERS,
    "roles_to_train": _ANSWERS,
    "ignore_pad_token_for_loss": "-: padding is never learned",
    "dataset_num_proc": _TOKENIZED,
    "preprocessing_num_workers": _TOKENIZED,
    "dataset_prepared_path": _TOKENIZED,
    "tokenized_path": _TOKENIZED,
    "lazy_tokenize": _TOKENIZED,
    "overwrite_cache": "-: nothing of the rows is cached",
    # --- the adapter
    "rank": "lora.r",
    "lora_rank": "lora.r",
    "lora_r": "lora.r",
    "adapter_rank": "lora.r",
    "alpha": "lora.lora_alpha",
    "scale": "lora.lora_alpha (= scale × r)",
    "lora_scale": "lora.lora_alpha (= scale × r)",
    "lora_multiplier": "lora.lora_alpha (= scale × r)",
    "dropout": "lora.lora_dropout",
    "dropout_rate": "lora.lora_dropout",
    "adapter_dropout": "lora.lora_dropout",
    "lora_target": "lora.target_modules (all is all-linear)",
    "lora_targets": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lora_target_linear": "lora.target_modules (true is all-linear)",
    "lora_target_parameters": "lora.target_parameters",
    "target_linear": "lora.target_modules (true is all-linear)",
    "keys": "lora.target_modules",
    "additional_target": "lora.modules_to_save",
    "lora_modules_to_save": "lora.modules_to_save",
    "lora_fan_in_fan_out": "lora.fan_in_fan_out",
    "lora_task_type": "lora.task_type",
    "lora_layers": "lora.layers_to_transform (their numbers, where mlx-lm counts from the last)",
    "num_layers": "lora.layers_to_transform (their numbers, where mlx-lm counts from the last)",
    "peft_layers_to_transform": "lora.layers_to_transform",
    "peft_use_dora": "lora.use_dora",
    "dora": "lora.use_dora",
    "peft_use_rslora": "lora.use_rslora",
    "rslora": "lora.use_rslora",
    "peft_init_lora_weights": "lora.init_lora_weights",
    "init_weights": "lora.init_lora_weights",
    "pissa_init": "lora.init_lora_weights (=pissa)",
    "pissa_iter": "lora.init_lora_weights (=pissa_niter_16)",
    "lora_parameters": "lora (its rank is r, its scale lora_alpha / r, its keys target_modules)",
    "lora_config": "lora",
    "peft_config": "lora",
    "peft": "lora",
    "lorap_lr_ratio": "training.loraplus_lr_ratio",
    "lora_plus_lr_ratio": "training.loraplus_lr_ratio",
    "adapter": _ALWAYS,
    "use_peft": _ALWAYS,
    "use_lora": _ALWAYS,
    "finetuning_type": _ALWAYS,
    "fine_tune_type": _ALWAYS,
    "train_type": _ALWAYS,
    "sft_type": _ALWAYS,
    "tuner_type": _ALWAYS,
    "full_finetuning": _ALWAYS,
    "stage": _SFT,
    "rl": _SFT,
    "rlhf_type": _SFT,
    "adapter_name_or_path": _ONGOING,
    "lora_model_dir": _ONGOING,
    "resume_adapter_file": _ONGOING,
    "adapters": _ONGOING,
    "auto_resume_from_checkpoints": _ONGOING,
    "resume": _ONGOING,
    # --- the optimisation
    "trainer": "training",
    "training_args": "training",
    "training_arguments": "training",
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "n_epochs": "training.num_train_epochs",
    "train_epochs": "training.num_train_epochs",
    "iters": "training.max_steps",
    "steps": "training.max_steps",
    "num_steps": "training.max_steps",
    "max_train_steps": "training.max_steps",
    "train_iters": "training.max_steps",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "train_batch_size": "training.per_device_train_batch_size",
    "per_device_batch_size": "training.per_device_train_batch_size",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "grad_accum": "training.gradient_accumulation_steps",
    "grad_accum_steps": "training.gradient_accumulation_steps",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "gradient_accumulation": "training.gradient_accumulation_steps",
    "accumulate_grad_batches": "training.gradient_accumulation_steps",
    "optimizer": "training.optim",
    "optimizer_type": "training.optim",
    "adafactor": "training.optim (=adafactor)",
    "lr_scheduler": "training.lr_scheduler_type",
    "lr_schedule": "training.lr_scheduler_type",
    "scheduler": "training.lr_scheduler_type",
    "cosine_min_lr_ratio": "training.lr_scheduler_kwargs (={min_lr_rate: …}, cosine_with_min_lr)",
    "warmup_ratio": "training.warmup_steps (a value below 1 is a share of all steps)",
    "warmup": "training.warmup_steps (a value below 1 is a share of all steps)",
    "warmup_steps_ratio": "training.warmup_steps (a value below 1 is a share of all steps)",
    "lr_warmup_steps": "training.warmup_steps",
    "num_warmup_steps": "training.warmup_steps",
    "gradient_clipping": "training.max_grad_norm",
    "grad_clip": "training.max_grad_norm",
    "clip_grad_norm": "training.max_grad_norm",
    "max_norm": "training.max_grad_norm",
    "beta1": "training.adam_beta1",
    "beta2": "training.adam_beta2",
    "neftune_alpha": "training.neftune_noise_alpha",
    "noisy_embedding_alpha": "training.neftune_noise_alpha",
    "label_smoothing": "training.label_smoothing_factor",
    "grad_checkpoint": "training.activation_checkpointing",
    "grad_checkpointing": "training.activation_checkpointing",
    "use_gradient_checkpointing": "training.activation_checkpointing",
    "disable_gradient_checkpointing": "training.activation_checkpointing",
    "group_by_length": _LIKE_LENGTHS,
    "early_stopping": "early_stopping_patience",
    "early_stopping_steps": "early_stopping_patience",
    # --- evaluating, logging, saving
    "evaluation_strategy": "training.eval_strategy",
    "evals_per_epoch": _EACH_EPOCH.format("eval_steps"),
    "eval_times": _EACH_EPOCH.format("eval_steps"),
    "saves_per_epoch": _EACH_EPOCH.format("save_steps"),
    "steps_per_eval": "training.eval_steps (with training.eval_strategy=steps)",
    "eval_every": "training.eval_steps (with training.eval_strategy=steps)",
    "steps_per_report": "training.logging_steps",
    "log_every": "training.logging_steps",
    "save_every": "training.save_steps",
    "checkpoint_every": "training.save_steps",
    "save_safetensors": "-: adapters are always safetensors",
    "logging_dir": "-: a tracker's files lie in output_dir",
    "plot_loss": "-: report.html has the curves",
    "wandb_project": _WANDB,
    "wandb_name": "training.run_name (with training.report_to=wandb)",
    "wandb_entity": _WANDB,
    "wandb_watch": _WANDB,
    "wandb_run_id": _WANDB,
    "use_wandb": "training.report_to (=wandb)",
    "mlflow_tracking_uri": "-: set MLFLOW_TRACKING_URI",
    "output": "output_dir",
    "out_dir": "output_dir",
    "save_dir": "output_dir",
    "save_path": "output_dir",
    "adapter_path": "output_dir",
    "overwrite_output_dir": _OUTPUT,
    "add_version": _OUTPUT,
    "hf_hub_token": _HUB,
    "push_to_hub_model_id": _HUB,
    "push_to_hub_token": _HUB,
    "predict_with_generate": "-: lorakit eval generates and compares answers",
    "compute_accuracy": "-: lorakit eval generates and compares answers",
    "max_new_tokens": "-: of lorakit eval and generate, as --max-new-tokens",
    # --- the machine
    "no_cuda": "training.use_cpu",
    "use_mps_device": "-: Apple's GPU is used where it is there",
    "device": "training.use_cpu (=true; else the best device is used)",
    "num_workers": "training.dataloader_num_workers",
    "use_ipex": "-: PyTorch's own kernels are used",
    "jit_mode_eval": "-: compile at the top of the recipe compiles for training",
    "torchdynamo": "compile",
    "fsdp_min_num_params": "training.fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "training.fsdp_config",
    "half_precision_backend": "dtype",
    "fp16_backend": "dtype",
    "fp16_opt_level": "dtype",
    "include_tokens_per_second": "-: metrics.jsonl always has them",
    "include_inputs_for_metrics": "-: an evaluation keeps no predictions",
    "past_index": "-: it has no effect on causal language models",
}
"""By the name in lower case and with underscores: what to give instead."""


def instead(name: str) -> str | None:
    """What to give instead of another tool's `name`; None where it is none.

    Args:
        name: as it was given: `cutoff_len`, `--cutoff-len`.
    """
    hint = OTHER_NAMES.get(plain(name))
    if hint is None:
        return None
    return f"leave it out: {hint[3:]}" if hint.startswith("-: ") else f"use {hint}"


def plain(name: str) -> str:
    """A name as the table has it: lower case, underscores, no leading dashes."""
    return name.strip().lstrip("-").lower().replace("-", "_")


_HEAD = """\
# Names of other tools

Keys of LLaMA-Factory, Axolotl, Unsloth, TRL, ms-swift, mlx-lm and older transformers, and what
they are called in a recipe. Given to lorakit, in a recipe, as `KEY=VALUE` or as `--key`, each is
refused with this line. Fields of `LoraConfig` and `TrainingArguments` keep their names, under
`lora` and `training`.

The table is made of `lorakit/training/other_names.py` by `python -m lorakit.training.other_names`.

| there | here |
| --- | --- |
"""


def table() -> str:
    """docs/other-names.md."""
    lines = []
    for name, hint in sorted(OTHER_NAMES.items()):
        key, space, note = hint.partition(" (")
        here = f"{hint[3:]}" if hint.startswith("-: ") else f"`{key}`{space}{note}"
        lines.append(f"| `{name}` | {here} |")
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
