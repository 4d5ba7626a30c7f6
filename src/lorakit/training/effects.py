"""Settings that would do nothing beside the other settings of a run: refused by name, or noticed.

What a field of `TrainingArguments` is by itself stands in `arguments.py`; here it is looked at
beside what else the recipe says, before anything is written.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.errors import InputError, did_you_mean, first_line
from lorakit.evaluation.metrics import score_name

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from lorakit.objectives.objective import Objective


class RecipeSettings(Protocol):
    """What is looked at here of a `recipe.Recipe`, which calls this module."""

    training: Any
    data: Any
    lora: dict[str, Any]
    dtype: Any
    quantization: Any
    compile: Any
    early_stopping_patience: int | None
    eval: Any

    def make_objective(self) -> Objective: ...
    @property
    def task_type(self) -> str: ...


BY_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
"""Schedules that change the learning rate when held-out rows were evaluated."""

_ADAM = {"adam_beta1": (0.5, 0.6), "adam_beta2": (0.5, 0.6), "adam_epsilon": (1e-3, 1e-4)}
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
_CHECKPOINTING_OPTIONS = (
    "use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop",
    "every_n_layers", "offload",
)  # fmt: skip
_LEAST = {
    "neftune_noise_alpha": 0,
    "adam_epsilon": 0,
    "eval_delay": 0,
    "eval_steps": 0,
    "torch_empty_cache_steps": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "ddp_timeout": 1,
    "ddp_bucket_cap_mb": 1,
}
_LEVELS = ("passive", "debug", "detail", "info", "warning", "error", "critical")
_CHOICES = {
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
}
_WORKERS = ("persistent_workers", "prefetch_factor", "multiprocessing_context")
_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
_DDP = ("find_unused_parameters", "bucket_cap_mb", "broadcast_buffers", "static_graph", "backend")


def check_recipe(recipe: RecipeSettings) -> None:
    """Raises InputError for the first setting of a recipe that the others leave without effect."""
    given = {k: v for k, v in (recipe.training.model_extra or {}).items() if v is not None}
    for look in (
        _of_objective,
        _of_model,
        _of_streaming,
        _of_ranges,
        _of_evaluation,
        _of_saving,
        _of_the_rest,
    ):
        for reason in look(recipe, given):
            raise InputError(reason)


def needs_held_out_rows(recipe: RecipeSettings) -> str | None:
    """What of a recipe cannot be done without held-out rows, as a key and its value."""
    given, training = recipe.training.model_extra or {}, recipe.training
    if training.save_strategy == "best":
        return "training.save_strategy=best"
    if training.lr_scheduler_type in BY_EVALUATIONS:
        return f"training.lr_scheduler_type={training.lr_scheduler_type}"
    if recipe.eval.generate:
        return "eval.generate"
    names = ("eval_on_start", "eval_delay", "eval_steps", "load_best_model_at_end")
    return next((f"training.{name}" for name in names if given.get(name)), None)


def _of_objective(recipe: RecipeSettings, given: dict[str, Any]) -> Iterator[str]:
    yield from recipe.make_objective().refused(recipe)


def _of_model(recipe: RecipeSettings, given: dict[str, Any]) -> Iterator[str]:
    for key, asked in (("data.packing", recipe.data.packing), ("compile", recipe.compile)):
        objective = recipe.make_objective()
        if asked is True and not objective.packable:
            other = recipe.task_type != "CAUSAL_LM"
            what = f"lora.task_type {recipe.task_type}" if other else f"objective {objective.name}"
            yield f"{key} is for causal language models: leave it out with {what}"
    if recipe.quantization is None:
        return
    if recipe.compile is True:
        yield "compile cannot be true with quantization: leave it out"
    if recipe.dtype == "float64":
        yield "quantization has no float64: leave dtype out, or give float32"
    for key in ("fsdp", "deepspeed"):
        if given.get(key):
            yield f"training.{key} does not spread quantised weights: leave it out"


def _of_streaming(recipe: RecipeSettings, given: dict[str, Any]) -> Iterator[str]:
    data, objective = recipe.data, recipe.make_objective()
    if not data.streaming:
        if data.buffer_size != type(data).model_fields["buffer_size"].default:
            yield "data.buffer_size has no effect without data.streaming=true: add it"
        return
    if recipe.training.max_steps < 1:
        yield (
            "data.streaming reads rows as they come and does not know how many there are: give "
            "training.max_steps"
        )
    if isinstance(data.eval, float) and data.eval:
        yield (
            "data.streaming: no share of rows that are read as they come can be held out: give "
            "data.eval a file of its own, or 0"
        )
    sources = data.train if isinstance(data.train, list) else []
    if any(getattr(source, "weight", 1) != 1 for source in sources):
        yield "data.streaming reads sources one behind the other: leave their weights out"
    if not objective.streams():
        yield (
            f"data.streaming: objective {objective.name} needs all rows before it begins: leave "
            "data.streaming out"
        )
    if given.get("dataloader_num_workers"):
        yield "training.dataloader_num_workers cannot be used with data.streaming: leave it out"


def _of_ranges(recipe: RecipeSettings, given: dict[str, Any]) -> Iterator[str]:
    for name in ("label_smoothing_factor", "adam_beta1", "adam_beta2"):
        if not 0 <= given.get(name, 0) < 1:
            yield f"training.{name}: should be in [0, 1), not {given[name]}"
    for name, least in _LEAST.items():
        if given.get(name, least) < least:
            yield f"training.{name}: should be {least} or more, not {given[name]}"
    for name, known in _CHOICES.items():
        if given.get(name, known[0]) not in known:
            yield f"training.{name}: should be one of {', '.join(known)}, not {given[name]!r}"
    warmup = recipe.training.warmup_steps
    if warmup >= 1 and warmup != int(warmup):
        yield (
            f"training.warmup_steps: should be a whole number, or below 1 a share of all steps, "
            f"not {warmup}"
        )


def _of_evaluation(recipe: RecipeSettings, given: dict[str, Any]) -> Iterator[str]:
    strategy = recipe.training.eval_strategy
    if recipe.early_stopping_patience and (recipe.data.eval == 0 or strategy == "no"):
        yield (
            "early_stopping_patience goes by the held-out loss: "
            "leave data.eval above 0 and training.eval_strategy on"
        )
    if recipe.eval.generate and strategy == "no":
        yield "eval.generate has no effect with training.eval_strategy=no: leave one of them out"
    if recipe.data.eval == 0 and (name := needs_held_out_rows(recipe)):
        yield f"{name} needs held-out rows: leave data.eval above 0, or leave it out"
    if given.get("eval_steps") and strategy != "steps":
        yield (
            f"training.eval_steps has no effect with eval_strategy {strategy}: add "
            "training.eval_strategy=steps"
        )
    by_best = strategy != "no" and (
        recipe.early_stopping_patience
        or given.get("load_best_model_at_end")
        or recipe.training.save_strategy == "best"
        or recipe.training.lr_scheduler_type in BY_EVALUATIONS
    )
    needs = needs_held_out_rows(recipe)
    if strategy == "no" and needs not in (None, "training.eval_on_start"):
        yield f"{needs} needs evaluations: leave training.eval_strategy=no out"
    for name in ("metric_for_best_model", "greater_is_better"):
        if name in given and not by_best:
            yield (
                f"training.{name} has no effect: give training.load_best_model_at_end=true, "
                "early_stopping_patience, or training.save_strategy=best"
            )
    metric = str(given.get("metric_for_best_model", "loss"))
    grows = greater_is_better(recipe, metric)
    if given.get("greater_is_better", grows) != grows:
        better = "when it is greater" if grows else "when it is smaller"
        yield f"training.greater_is_better: {metric} is better {better}; leave it out"


def greater_is_better(recipe: RecipeSettings, metric: str) -> bool:
    """Whether more of a metric of `training.metric_for_best_model` is better."""
    name = score_name(metric)
    return not name.endswith("loss") and name not in recipe.make_objective().lower_is_better


def _of_saving(recipe: RecipeSettings, given: dict[str, Any]) -> Iterator[str]:
    training = recipe.training
    usual = type(training).model_fields["save_steps"].default
    by_best = recipe.early_stopping_patience or given.get("load_best_model_at_end")
    if training.save_strategy != "steps" and training.save_steps != usual and not by_best:
        yield (
            f"training.save_steps has no effect with save_strategy {training.save_strategy}: "
            "leave one of them out"
        )
    if given.get("save_only_model") and training.save_strategy == "no":
        yield "training.save_only_model has no effect with save_strategy no: leave it out"


def _of_the_rest(recipe: RecipeSettings, given: dict[str, Any]) -> Iterator[str]:
    from lorakit.lora.init import registered

    for init in registered():
        if recipe.lora.get(init.field) and recipe.lora.get("init_lora_weights") != init.value:
            yield (
                f"lora.{init.field} has no effect without "
                f"lora.init_lora_weights={init.value}: add it"
            )
    new, old = _CHECKPOINTING
    for suffix in ("", "_kwargs"):
        first, second = given.get(new + suffix), given.get(old + suffix)
        if None not in (first, second) and first != second:
            yield f"training.{new}{suffix} and {old}{suffix} are one setting: give one of them"
    for name in _CHECKPOINTING:
        if given.get(f"{name}_kwargs") and not (given.get(new) or given.get(old)):
            yield f"training.{name}_kwargs has no effect without training.{new}=true: add it"
        options = given.get(f"{name}_kwargs")
        for option in options if isinstance(options, dict) else ():
            if option not in _CHECKPOINTING_OPTIONS:
                near = did_you_mean(str(option), _CHECKPOINTING_OPTIONS)
                yield f"training.{name}_kwargs: {option} is none of its options{near}"
    for name in _WORKERS:
        if given.get(f"dataloader_{name}") and not given.get("dataloader_num_workers"):
            yield (
                f"training.dataloader_{name} has no effect without workers: give "
                "training.dataloader_num_workers too"
            )
    trackers = recipe.training.report_to
    trackers = [trackers] if isinstance(trackers, str) else trackers
    if "run_name" in given and set(trackers) <= {"none"}:
        yield "training.run_name has no effect without a tracker: give training.report_to too"
    for name in _TRACKIO:
        if name in given and not {"trackio", "all"} & set(trackers):
            yield f"training.{name} has no effect without training.report_to=trackio: add it"


def check_metric(args: TrainingArguments, known: Collection[str]) -> None:
    """Raises InputError where the best model goes by a metric that no evaluation gives.

    Args:
        known: what an evaluation gives.
    """
    metric = args.metric_for_best_model
    if metric is not None and score_name(metric) not in known:
        near = did_you_mean(score_name(metric), known)
        raise InputError(
            f"training.metric_for_best_model: an evaluation of this run gives no '{metric}'{near}; "
            f"it gives {', '.join(known)}"
        )


def check_optimizer(args: TrainingArguments, given: Collection[str]) -> None:
    """Raises InputError where the optimiser is none for adapters, is missing, or reads not all.

    Args:
        given: the fields of `TrainingArguments` that the recipe has.
    """
    import torch
    from transformers import Trainer

    name = str(getattr(args.optim, "value", args.optim))
    if "galore" in name or "apollo" in name:
        raise InputError(
            f"training.optim={name} projects the gradients of full matrices to a low rank, which "
            "an adapter's already are: choose another optimiser"
        )
    if "lomo" in name:
        raise InputError(
            f"training.optim={name} steps while gradients are made, without accumulation and the "
            "clipping of training.max_grad_norm: choose another optimiser"
        )

    def options(**changed: Any) -> str:
        own = copy.copy(args)
        for key, value in changed.items():
            setattr(own, key, value)
        return repr(Trainer.get_optimizer_cls_and_kwargs(own, None))

    try:
        whole = options()
        kind, own = Trainer.get_optimizer_cls_and_kwargs(args, None)
        if isinstance(kind, type):
            kind([torch.zeros(1, requires_grad=True)], **own)
    except (ImportError, ValueError, RuntimeError, AttributeError) as error:
        what = f"optim_args={args.optim_args}" if args.optim_args else f"optim={name}"
        raise InputError(f"training.{what}: {first_line(error)}") from error
    for key, (one, other) in _ADAM.items():
        if key in given and options(**{key: one}) == options(**{key: other}):
            raise InputError(f"training.{key} has no effect with optim={name}: leave it out")

    def is_read(others: Sequence[str], key: str) -> bool:
        for value in ("0.123", "7", "True"):
            try:
                if options(optim_args=",".join([*others, f"{key}={value}"])) != whole:
                    return True
            except (ValueError, RuntimeError, AttributeError):
                return True
        return False

    entries = [entry for entry in (args.optim_args or "").replace(" ", "").split(",") if entry]
    for entry in entries:
        key = entry.partition("=")[0]
        if not is_read([other for other in entries if other != entry], key):
            raise InputError(
                f"training.optim_args: {key} has no effect with optim={name}: leave it out"
            )


def check_trackers(args: TrainingArguments) -> None:
    """Raises InputError where a tracker is unknown or not installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
    except (ImportError, RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"training.report_to: {first_line(error)}") from error


def of_several_processes(args: TrainingArguments, given: Collection[str]) -> list[str]:
    """A notice for what is read by several processes alone, where there is one."""
    named = [f"ddp_{name}" for name in (*_DDP, "timeout") if f"ddp_{name}" in given]
    if args.world_size > 1 or not named:
        return []
    return [f"training.{', '.join(named)} has no effect with one process"]
