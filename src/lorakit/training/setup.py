"""From a recipe to everything that a run needs: what `check` looks at and `train` trains.

Nothing is written here. What was chosen or done otherwise than the recipe says becomes notices.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments, set_seed

from lorakit.adapters.lineage import read_start
from lorakit.data.dataset import PreparedData
from lorakit.data.template_clock import Rendering
from lorakit.engine.sampler import sampled_answers
from lorakit.errors import InputError
from lorakit.evaluation.metrics import score_name
from lorakit.lora import LoraModel
from lorakit.lora.config import LoraConfig
from lorakit.lora.init_from_data import start_from_data
from lorakit.lora.parameters import count_parameters
from lorakit.models.fused import fused
from lorakit.models.lines import Lines
from lorakit.models.load import best_device, torch_dtype
from lorakit.models.template_files import template_in
from lorakit.objectives.objective import Objective, TrainingInputs
from lorakit.objectives.run_request import RunRequest
from lorakit.rl.sources import RolloutSource, open_source
from lorakit.training.adapter_settings import adapter_config
from lorakit.training.advice import Advice, advised
from lorakit.training.batching import BatchDataset, Batching, choose_batching
from lorakit.training.compiling import choose, compile_blocks
from lorakit.training.differences import run_identity
from lorakit.training.effects import (
    check_metric,
    check_optimizer,
    check_trackers,
    greater_is_better,
    needs_held_out_rows,
    of_several_processes,
)
from lorakit.training.generation import HeldOutAnswers, held_out_answers
from lorakit.training.machine import settle_in
from lorakit.training.picture_lines import why_padded
from lorakit.training.position import planned_steps
from lorakit.training.recipe import Recipe, TrainingRecipe
from lorakit.training.schedule import check_schedule
from lorakit.training.sharded import asks_to_spread, check_fsdp
from lorakit.training.stages import check_start, set_reference, started
from lorakit.training.trainer import LoraTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_START_BATCHES = 16
"""Batches of the first epoch that an initialisation from data sees."""


@dataclass
class Setup:
    """A run that is ready to begin.

    Attributes:
        recipe: with what it left out filled in, as `advice` says.
        inputs: what the objective has read and loaded.
        base_fingerprint: of the base model's weights.
        notices: lines for the user.
        answers: what evaluations generate (`eval.generate`), if anything.
        source: what samples completions, if the objective learns from some.
    """

    recipe: Recipe
    advice: list[Advice]
    inputs: TrainingInputs
    model: LoraModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    arguments: TrainingArguments
    batching: Batching
    compiled: bool
    base_fingerprint: str | None
    notices: list[str]
    answers: HeldOutAnswers | None = None
    source: RolloutSource | None = None

    def close(self) -> None:
        """Ends the processes of rewards and environments."""
        self.inputs.objective.close()
        if self.source is not None:
            self.source.close()

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the run's numbers (`run_identity`)."""
        start, teacher = self.inputs.start, self.inputs.teacher
        return run_identity(
            self.recipe.to_dict(),
            self.data_facts,
            self.arguments.world_size,
            self.base_fingerprint,
            **self.inputs.rendering_facts(),
            parent=start.record.sha256 if start else None,
            teacher=teacher.sha256 if teacher else None,
            rewards=self.inputs.objective.reward_facts,
            environment=self.environment_files,
        )

    @property
    def environment_files(self) -> dict[str, str]:
        """SHA-256 of the files of an environment and of tools, by name."""
        return {} if self.source is None else dict(self.source.files)

    @property
    def data_facts(self) -> list[dict[str, Any]]:
        """The files that were read, as plain JSON types."""
        return [fact.to_dict() for fact in self.data.facts]

    def trainer(self) -> LoraTrainer:
        """What trains the model on the rows."""
        data, inputs = self.data, self.inputs
        trainer = LoraTrainer(
            self.model,
            self.arguments,
            data.train,
            data.eval,
            self.batching,
            inputs.objective,
            self.recipe.training.loraplus_lr_ratio,
            data.stream,
            self.tokenizer,
            self.source,
        )
        trainer.templates, trainer.answers = inputs.templates, self.answers
        trainer.own_tokenizer = inputs.tokenizer if inputs.own_tokenizer else None
        trainer.stands_on = inputs.start.frozen if inputs.start else ()
        return trainer

    @contextmanager
    def fast(self) -> Iterator[None]:
        """The model with its blocks compiled, or with fused norms and MLPs, to train in."""
        if self.compiled:
            compile_blocks(self.model)
            yield
        else:
            with fused(self.model):
                yield


def set_up(
    recipe: Recipe,
    inputs: TrainingInputs | None = None,
    rendering: Rendering | None = None,
    objective: Objective | None = None,
) -> Setup:
    """Loads the model and the rows, and settles what the recipe leaves open.

    Args:
        inputs: model and rows that are loaded already; the model has no adapter.
        rendering, objective: as in `load_inputs`, for rows that are loaded here.

    Raises:
        InputError: the recipe, the model or the rows cannot be used.
    """
    settle_in()
    spread = asks_to_spread(recipe.training.model_extra or {})
    if inputs is None:
        # A model that is spread over GPUs may not fit into one: each takes its share from here.
        device = wished_device(recipe)
        dtype = torch_dtype(recipe.dtype, device or best_device(), training=True)
        inputs = load_inputs(recipe, dtype, "cpu" if spread else device, rendering, objective)
    model, tokenizer, data = inputs.model, inputs.tokenizer, inputs.data
    parameters = count_parameters(model)[1]
    recipe, advice = advised(recipe, parameters, len(data.train))
    if inputs.start is not None:
        labels = inputs.objective.labels
        form = inputs.objective.task_type
        check_start(inputs.start, recipe.model, inputs.base_fingerprint, labels, form)
    set_seed(recipe.training.seed)
    arguments = training_arguments(recipe, held_out=bool(data.eval))
    adapted = started(inputs, _adapter_config(inputs, recipe, arguments))
    if not data.eval and (name := needs_held_out_rows(recipe)):
        raise InputError(f"{name} needs held-out rows, and there are none: give data.eval a file")
    if arguments.label_smoothing_factor and not inputs.objective.smooths_labels:
        raise InputError(
            "training.label_smoothing_factor has no effect with objective "
            f"{inputs.objective.name}: leave it out"
        )
    if spread and inputs.objective.on_policy:
        cure = ", or set objective.lmbda to 0" if inputs.objective.name == "distill" else ""
        raise InputError(
            f"objective {inputs.objective.name} samples from the model in training, which needs "
            f"all weights in one process: leave fsdp out{cure}"
        )
    answers = None
    if (generate := recipe.eval.generate) is not None:
        if spread:
            raise InputError("eval.generate needs all weights in one process: leave fsdp out")
        answers = held_out_answers(
            generate, inputs.objective, data.eval_samples, adapted, tokenizer
        )
    more = answers.names if answers else []
    check_metric(arguments, ["loss", *inputs.objective.score_names, *more])
    check_fsdp(arguments, adapter_config(recipe, inputs))
    batching, notices = choose_batching(
        recipe,
        Lines(adapted),
        tokenizer.pad_token_id,
        inputs.collator,
        partial(why_padded, adapted, [*data.train, *data.eval]),
    )
    batching = replace(
        batching,
        to_batch=inputs.objective.to_batch,
        sampled_together=_sampled_together(inputs.objective, arguments),
    )
    batches = len(batching.train_batches(data.train, arguments, epoch=0))
    if data.stream is None:
        notices += _divided(len(data.train), batches, arguments)
    notices += check_schedule(arguments, planned_steps(arguments, batches))
    notices += of_several_processes(arguments, recipe.training.model_extra or {})
    if (shared := batching.shared_tokens(data.train, arguments)) >= 0.01:
        notices.append(
            f"{shared:.0%} of the tokens are prefixes that rows of a batch share: computed once"
        )
    never = not inputs.objective.packable or (spread and recipe.compile == "auto")
    compiled, notice = choose(
        False if never else recipe.compile, adapted, _tokens_to_train(data, batches, arguments)
    )
    notices += [notice] if notice else []
    if recipe.early_stopping_patience:
        notices.append("early stopping: saved whenever it is evaluated, and the best is kept")
    elif follows_evaluations(recipe):
        notices.append("saved whenever it is evaluated, as the best is to be loaded at the end")
    source = None
    if inputs.objective.on_policy:
        source = open_source(inputs.objective.rollouts, inputs.objective, tokenizer, adapted)
        notices += source.notices
    return Setup(
        recipe=recipe,
        advice=advice,
        inputs=inputs,
        model=adapted,
        tokenizer=tokenizer,
        data=data,
        arguments=arguments,
        batching=batching,
        compiled=compiled,
        base_fingerprint=inputs.base_fingerprint,
        notices=[*data.notices, *notices],
        answers=answers,
        source=source,
    )


def load_inputs(
    recipe: Recipe,
    dtype: torch.dtype,
    device: str | None = None,
    rendering: Rendering | None = None,
    objective: Objective | None = None,
) -> TrainingInputs:
    """Loads the recipe's model and prepares its rows, by its objective.

    Args:
        dtype, device: of the model, as in `load_model`.
        rendering: how rows become text; None is as the tokenizer has it, now.
        objective: what is learned, where it is not made from the recipe.

    Raises:
        InputError: the model or the rows cannot be used.
    """
    data, start = recipe.data, None
    if recipe.adapter is not None:
        start = read_start(recipe.adapter.path, recipe.adapter.mode, recipe.model)
    rendering = rendering or Rendering()
    if recipe.chat_template is not None and rendering.templates is None:
        rendering = replace(rendering, templates=template_in(recipe.chat_template))
    request = RunRequest(
        model=recipe.model,
        dtype=dtype,
        train=data.train,
        eval=data.eval,
        device=device,
        quantization=recipe.quantization,
        seed=recipe.training.seed,
        max_length=data.max_length,
        columns=data.columns or None,
        limit=data.limit,
        too_long=data.too_long,
        data_seed=recipe.data_seed,
        buffer_size=data.buffer_size if data.streaming else None,
        rendering=rendering,
        answer=sampled_answers,
        start=start,
        tokens=tuple(recipe.tokens),
        media_dir=data.media_dir,
        fetch_images=data.fetch_images,
    )
    objective = objective or recipe.make_objective()
    set_reference(objective, start)
    return objective.prepare(request)


def _adapter_config(
    inputs: TrainingInputs, recipe: Recipe, arguments: TrainingArguments
) -> LoraConfig:
    """The adapter's configuration; factors that come from data wait beside the model's layers.

    The data are batches of rows, and their loss is the objective's, under the bare base.
    """
    config = adapter_config(recipe, inputs)
    start, name = inputs.start, inputs.objective.name
    if config.bias != "none" and inputs.objective.reference is not None:
        raise InputError(
            f"lora.bias={config.bias} trains biases of the base itself, which the reference of "
            f"objective {name} would have too: leave it out"
        )
    if config.init.kind.collect is None or (start and start.record.mode == "continue"):
        return config
    if start is not None:
        raise InputError(
            f"lora.init_lora_weights={config.init_lora_weights} runs data through the bare base, "
            "without the frozen adapter: choose another initialisation"
        )
    if inputs.teacher is not None or not any(row.supervised for row in inputs.data.train):
        raise InputError(
            f"lora.init_lora_weights={config.init_lora_weights} takes the loss of rows with "
            f"answers under the bare base, and objective {name} has another teacher or no "
            "answers: choose another initialisation"
        )
    if asks_to_spread(recipe.training.model_extra or {}):
        raise InputError(
            f"lora.init_lora_weights={config.init_lora_weights} runs the model over data before "
            "it is spread over processes: leave fsdp out, or choose another initialisation"
        )
    model, objective = inputs.model, inputs.objective
    forward = objective.forward(model).calling(model, arguments.label_smoothing_factor)
    batching = Batching(inputs.tokenizer.pad_token_id, own_collator=inputs.collator)
    rows = BatchDataset(inputs.data.train, batching, learning=True)
    chosen = batching.train_batches(inputs.data.train, arguments, epoch=0)[:_START_BATCHES]

    def mean_loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not torch.is_grad_enabled():  # its inputs are all that is looked at: one pass will do
            total, count = forward.reader(model, batch)
            return total / count
        loss = objective.loss(forward, batch)
        return loss.total / loss.count

    batches = [{key: x.to(model.device) for key, x in rows[batch].items()} for batch in chosen]
    return start_from_data(model, config, batches, mean_loss)


def wished_device(recipe: Recipe) -> str | None:
    """`cpu` where the recipe asks for it, else None for the best that there is."""
    return "cpu" if (recipe.training.model_extra or {}).get("use_cpu") else None


def follows_evaluations(recipe: Recipe) -> bool:
    """Whether a run saves whenever it evaluates, as the recipe says nothing else of saving."""
    usual, training = TrainingRecipe.model_fields, recipe.training
    return bool((training.model_extra or {}).get("load_best_model_at_end")) and all(
        getattr(training, name) == usual[name].default for name in ("save_strategy", "save_steps")
    )


def training_arguments(recipe: Recipe, *, held_out: bool) -> TrainingArguments:
    """Trainer's arguments: the recipe's, over what this trainer wants otherwise than Trainer.

    Args:
        held_out: whether there are rows to evaluate on.

    Raises:
        InputError: Trainer refuses them.
    """
    values = {
        "output_dir": recipe.output_dir,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # it would hide a loss that is NaN or Inf
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": False,
        **recipe.training.model_dump(exclude={"loraplus_lr_ratio"}),  # the trainer's own
    }
    # Unless told so, accelerate would start no process group without a GPU.
    values["use_cpu"] = values["use_cpu"] or not torch.accelerator.is_available()
    if "LOCAL_RANK" not in os.environ:  # one process forms no group
        values.pop("ddp_backend", None)
    if recipe.training.per_device_eval_batch_size is None:
        del values["per_device_eval_batch_size"]  # batches are made without it
    if not held_out:
        values["eval_strategy"] = "no"
    if recipe.early_stopping_patience:
        values["load_best_model_at_end"] = True
    if recipe.early_stopping_patience or follows_evaluations(recipe):
        # The best weights must have been saved when they were evaluated.
        every = values.get("eval_steps") or values["logging_steps"]
        values |= {"save_strategy": values["eval_strategy"], "save_steps": every}
    if values.get("load_best_model_at_end") or values["save_strategy"] == "best":
        values.setdefault("metric_for_best_model", "loss")
    if metric := values.get("metric_for_best_model"):
        values["metric_for_best_model"] = score_name(metric)
        if values.get("greater_is_better") is None:
            values["greater_is_better"] = greater_is_better(recipe, metric)
    if values.get("deepspeed") and not find_spec("deepspeed"):
        raise InputError("training.deepspeed needs DeepSpeed: pip install deepspeed")
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}") from error
    check_optimizer(arguments, recipe.training.model_extra or {})
    check_schedule(arguments, max(arguments.max_steps, 100))
    check_trackers(arguments)
    if arguments.n_gpu > 1:
        # Trainer would use nn.DataParallel, which cuts a line of rows anywhere.
        arguments._n_gpu = 1
    return arguments


def _sampled_together(objective: Objective, arguments: TrainingArguments) -> tuple[int, int] | None:
    """`Batching.sampled_together`."""
    step = arguments.gradient_accumulation_steps
    size, times = objective.steps_per_generation or step, objective.num_iterations
    return None if (size, times) == (step, 1) else (size, times)


def _divided(rows: int, batches: int, arguments: TrainingArguments) -> list[str]:
    """What to say about how rows are divided over processes, and how many GPUs that uses."""
    processes, gpus = arguments.world_size, torch.cuda.device_count()
    if rows < processes:
        raise InputError(
            f"data.train: {rows} rows cannot be divided over {processes} processes: start fewer"
        )
    notices = []
    if gpus > processes:
        many = f"torchrun --nproc-per-node {gpus} -m lorakit train …"
        notices.append(f"{processes} of {gpus} GPUs used; {many}")
    if processes > 1 and (twice := -batches % processes):
        notices.append(
            f"{twice} rows are learned twice in an epoch, as batches of one row cannot be divided "
            f"evenly over {processes} processes: raise training.per_device_train_batch_size"
        )
    return notices


def _tokens_to_train(data: PreparedData, batches: int, arguments: TrainingArguments) -> float:
    """The tokens of all epochs, or of the steps that `max_steps` stops after."""
    epochs = arguments.num_train_epochs
    if arguments.max_steps > 0:
        step = arguments.gradient_accumulation_steps * arguments.world_size
        epochs = arguments.max_steps * step / batches
    return epochs * sum(len(row) for row in data.train)
