"""Configurations trained up to a share of their steps: a group in shared passes, or one alone.

A group is one loop: in each round every configuration gives its next batch, the base computes all
of them in as few passes as fit, and each configuration steps when its last batch of a step is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainingArguments

from lorakit.engine.resident import ResidentModel
from lorakit.engine.shared_pass import AdapterBatch, passes
from lorakit.errors import InputError
from lorakit.lora.model import LoraModel
from lorakit.lora.routing import Route, Routing
from lorakit.lora.saving import save_adapter, write_card
from lorakit.objectives.objective import TrainingInputs
from lorakit.rl.engine_rollouts import EngineRollouts
from lorakit.sweeps.records import Progress
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.sweep_base import SweepBase
from lorakit.sweeps.sweep_trainer import SweepTrainer
from lorakit.training.interrupt import Interrupt, StoppedError
from lorakit.training.recipe import Recipe
from lorakit.training.schedule import check_schedule
from lorakit.training.setup import Setup, set_up, training_arguments
from lorakit.training.sharded import asks_to_spread
from lorakit.training.trainer import enable_checkpointing

RunPass = Callable[[Sequence[AdapterBatch]], None]
SAMPLED_TOKENS = 4096
"""The tokens of a pass over completions: how long these become is not known before the run."""

FindPassSize = Callable[[Sequence[AdapterBatch], RunPass], int | None]
"""Gives the tokens of a pass (None: all in one), by the largest batches and a way to try a pass."""


def advance_alone(
    base: SweepBase, configuration: Configuration, to: float, interrupt: Interrupt
) -> Progress:
    """Trains one configuration by itself, as `lorakit train` does.

    Raises:
        InputError: the adapter does not fit the base, or its folder is another run's.
        StoppedError: stopping was asked for; what was done is saved.
    """
    recipe = configuration.recipe
    inputs = base.inputs_for(recipe)
    _require_one_process(recipe)
    if not evaluates_itself(recipe, training_arguments(recipe, held_out=True)):
        inputs = _without_evaluation(inputs)
    setup = set_up(recipe, inputs)
    try:
        trainer = SweepTrainer(base, configuration, setup, to, interrupt)
        trainer.train_alone()
        objective = setup.inputs.objective
        return trainer.finish(
            None if trainer.diverged else base.held_out.of(setup.model, objective)
        )
    finally:
        base.stop_checkpointing()
        setup.model.unload()


def evaluates_itself(recipe: Recipe, args: TrainingArguments) -> str | None:
    """For which purpose a run evaluates while it trains; None where it need not."""
    if recipe.early_stopping_patience or args.load_best_model_at_end:
        return "it keeps its best weights by evaluations of its own"
    if args.eval_on_start:
        return "it evaluates before it begins"
    if args.save_strategy == "best":
        return "it saves by evaluations of its own"
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        return f"the schedule {args.lr_scheduler_type.value} goes by evaluations of its own"
    return None


def advance_group(
    base: SweepBase,
    configurations: Sequence[Configuration],
    to: float,
    interrupt: Interrupt,
    pass_size: FindPassSize,
) -> dict[str, Progress]:
    """Trains a group in shared passes.

    Raises:
        InputError, StoppedError: as in `advance_alone`.
    """
    named = {f"part{i}": configuration for i, configuration in enumerate(configurations)}
    with base.adapted({name: c.recipe for name, c in named.items()}) as resident:
        trainers = {
            name: SweepTrainer(base, own, _setup(base, own, resident, name), to, interrupt)
            for name, own in named.items()
        }
        _train(resident, trainers, pass_size)
        healthy = {n: t.objective for n, t in trainers.items() if t.diverged is None}
        found = base.held_out.of_each(resident, healthy) if healthy else {}
        return {named[n].name: trainer.finish(found.get(n)) for n, trainer in trainers.items()}


def _train(
    resident: ResidentModel, trainers: Mapping[str, SweepTrainer], pass_size: FindPassSize
) -> None:
    """Trains all up to their targets; where stopping is asked for, each finishes its step."""
    waiting = [trainer for trainer in trainers.values() if not trainer.is_done]
    tokens = None
    for trainer in waiting:  # of rows that all of them learn from, once
        trainer.compute_constants(len(waiting))
    if len(waiting) > 1:
        for trainer in waiting:
            enable_checkpointing(trainer.setup.model, trainer.args)
        if any(trainer.objective.on_policy for trainer in waiting):
            tokens = SAMPLED_TOKENS
        else:
            largest = [trainer.largest_batch() for trainer in waiting]
            tokens = pass_size(largest, lambda batches: _try(resident, batches))
    source: EngineRollouts | None = None
    for trainer in trainers.values():
        trainer.begin()
        if trainer.objective.on_policy and source is None:
            source = EngineRollouts(trainer.objective, trainer.setup.tokenizer)
    stopped: StoppedError | None = None
    while batches := _next_batches(resident, [*trainers.values()], tokens, source):
        for some in passes(batches, tokens):
            began = time.perf_counter()
            losses = resident.backward(some)
            _synchronize()
            each = (time.perf_counter() - began) / sum(batch.tokens for batch in some)
            for batch, loss in zip(some, losses, strict=True):
                try:
                    trainers[batch.adapter].take(loss, each * batch.tokens)
                except StoppedError as error:
                    stopped = error
    if stopped is not None:
        raise stopped


def _next_batches(
    resident: ResidentModel,
    trainers: Sequence[SweepTrainer],
    tokens: int | None,
    source: EngineRollouts | None,
) -> list[AdapterBatch]:
    """Each configuration's next batch, with what its loss needs besides.

    What is sampled for them is written in one batch of rows, and what they need of their other
    batches, or of the bare base, is computed in passes that they share, without gradients.
    """
    if source is not None:
        _sample(resident, trainers, source)
    read = [trainer.read_beforehand for trainer in trainers]
    for trainer, losses in zip(trainers, _losses(resident, read, tokens), strict=True):
        if losses:
            trainer.take_beforehand(losses)
    read = [trainer.read_reference for trainer in trainers]
    for trainer, losses in zip(trainers, _losses(resident, read, tokens), strict=True):
        if losses:
            trainer.take_reference(losses)
    return [batch for trainer in trainers if (batch := trainer.next_batch) is not None]


def _sample(
    resident: ResidentModel, trainers: Sequence[SweepTrainer], source: EngineRollouts
) -> None:
    """Answers what the configurations ask for their next steps, each by its own adapter."""
    while waiting := [trainer for trainer in trainers if trainer.asked]:
        asked = [(prompt, trainer.adapter) for trainer in waiting for prompt in trainer.asked]
        prompts, adapters = zip(*asked, strict=True)
        began = time.perf_counter()
        found = iter(source.write_each(prompts, adapters, resident.model))
        each = (time.perf_counter() - began) / len(asked)
        for trainer in waiting:
            own = [next(found) for _ in trainer.asked]
            trainer.take_rollouts(own, each * len(own))


def _losses(
    resident: ResidentModel, read: Sequence[Sequence[AdapterBatch]], tokens: int | None
) -> list[list[torch.Tensor]]:
    """The token losses of several configurations' batches, in passes that they share."""
    if not any(read):
        return [[] for _ in read]
    resident.model.eval()
    with torch.no_grad():
        together = passes([batch for own in read for batch in own], tokens)
        found = iter([each for some in together for each in resident.token_losses(some)])
    return [[next(found) for _ in own] for own in read]


def _try(resident: ResidentModel, batches: Sequence[AdapterBatch]) -> None:
    """A pass of which nothing is left."""
    with torch.random.fork_rng():
        resident.backward(batches)
        _synchronize()
    resident.model.zero_grad()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what is timed must have happened


def _setup(
    base: SweepBase, configuration: Configuration, resident: ResidentModel, adapter: str
) -> Setup:
    """A run on an adapter of a shared model, which is ready to begin."""
    recipe = configuration.recipe
    inputs = _without_evaluation(base.inputs_for(recipe))
    _require_one_process(recipe)
    batching, notices = base.batching(recipe, inputs.objective)
    arguments = training_arguments(recipe, held_out=False)
    return Setup(
        recipe=recipe,
        advice=[],
        inputs=inputs,
        model=AdapterView(resident.model, adapter),  # type: ignore[arg-type]
        tokenizer=inputs.tokenizer,
        data=inputs.data,
        arguments=arguments,
        batching=batching,
        compiled=False,
        base_fingerprint=base.fingerprint,
        notices=[*notices, *check_schedule(arguments, base.steps(recipe, arguments))],
    )


def _without_evaluation(inputs: TrainingInputs) -> TrainingInputs:
    return replace(inputs, data=replace(inputs.data, eval=[], eval_samples=[]))


def _require_one_process(recipe: Recipe) -> None:
    """Raises InputError where several processes are asked for."""
    if asks_to_spread(recipe.training.model_extra or {}):
        raise InputError(
            "a sweep keeps its base in one process: leave out training.fsdp and deepspeed"
        )
    if training_arguments(recipe, held_out=False).world_size > 1:
        raise InputError("configurations train together in one process: start it without torchrun")


class AdapterView(nn.Module):
    """The parameters of one adapter, under the names and in the order that they have alone.

    It is a Trainer's model where several are trained on one base: an optimizer over it, its groups
    and its state in a checkpoint are those of a run that trains this adapter by itself.
    """

    whole: LoraModel

    def __init__(self, whole: LoraModel, name: str) -> None:
        super().__init__()
        object.__setattr__(self, "whole", whole)  # no submodule: its parameters are not ours
        self.active_adapter = name
        own = {id(tensor) for tensor in whole.adapter_tensors(name).values()}
        for path, parameter in whole.named_parameters():
            if id(parameter) in own:
                *parents, last = ("default" if p == name else p for p in path.split("."))
                place: nn.Module = self
                for parent in parents:
                    if parent not in place._modules:
                        place.add_module(parent, nn.Module())
                    place = place._modules[parent]  # type: ignore[assignment]
                place.register_parameter(last, parameter)

    @property
    def routing(self) -> Routing:
        """The whole model's: what it computes is decided by the route in force (`in_force`)."""
        return self.whole.routing

    @property
    def adapters(self) -> list[str]:
        """Its one adapter."""
        return [self.active_adapter]

    def require(self, name: str) -> None:
        """Raises InputError where the whole model has no such adapter."""
        self.whole.require(name)

    def in_force(self) -> AbstractContextManager[None]:
        """Within the block every row has this adapter."""
        return self.routing.using(Route(shared=(self.active_adapter,)))

    def get_base_model(self) -> nn.Module:
        """The base model, with all adapters beside its layers."""
        return self.whole.get_base_model()

    def train(self, mode: bool = True) -> Self:
        """Of the whole model."""
        self.whole.train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The whole model's, under the route in force."""
        return self.whole(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """The whole model's: every adapter's trainer asks it for the same."""
        kwargs = gradient_checkpointing_kwargs
        self.whole.gradient_checkpointing_enable(None if kwargs is None else {**kwargs}, **options)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True) -> None:
        """Writes this adapter alone, as `LoraModel.save_pretrained` writes an only one."""
        folder = Path(save_directory)
        save_adapter(self.whole, folder, self.active_adapter, write=is_main_process)
        if is_main_process:
            write_card(folder, self.get_base_model())
