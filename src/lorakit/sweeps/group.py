"""Configurations trained up to a share of their steps: a group in shared passes, or one alone.

A group is one loop: in each round every configuration gives its next batch, the base computes all
of them in as few passes as fit, and whoever has all batches of an optimizer step makes it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lorakit.engine.resident import ResidentModel
from lorakit.engine.shared_pass import AdapterBatch, passes
from lorakit.errors import InputError
from lorakit.lora.streams import Stream
from lorakit.sweeps.base import SplitLosses, SweepBase
from lorakit.sweeps.records import Progress
from lorakit.sweeps.sharing import evaluates_itself
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.trainer import AdapterView, DivergedError, OptimizerStep, SweepTrainer
from lorakit.training.batching import BatchDataset
from lorakit.training.checkpoints import newest_whole, step_of
from lorakit.training.differences import run_identity
from lorakit.training.early_stopping import stopped_before
from lorakit.training.interrupt import Interrupt, StoppedError
from lorakit.training.output import changes_since, claim_output, require_unchanged
from lorakit.training.position import planned_steps
from lorakit.training.recipe import Recipe
from lorakit.training.schedule import check_schedule
from lorakit.training.setup import Setup, set_up, training_arguments
from lorakit.training.sharded import asks_to_spread
from lorakit.training.trainer import enable_checkpointing
from lorakit.training.watch import warn_of_unchanged

FindRoom = Callable[[Sequence[AdapterBatch], Callable[[Sequence[AdapterBatch]], None]], int | None]
"""Gives the tokens of a pass, out of the largest batches and a function that tries a pass out."""


class Member:
    """A configuration in training: its trainer, and how far it goes.

    Args:
        setup: its run.
        to: the share of its planned steps at which it stops.
    """

    def __init__(
        self,
        base: SweepBase,
        configuration: Configuration,
        setup: Setup,
        to: float,
        interrupt: Interrupt,
    ) -> None:
        recipe, args = configuration.recipe, setup.arguments
        self.base, self.configuration, self.setup = base, configuration, setup
        self.folder = Path(recipe.output_dir)
        batches = setup.batching.train_batches(setup.data.train, args, epoch=0)
        self.planned = planned_steps(args, len(batches))
        # As a share of a whole number of steps may come out a little above it.
        self.target = max(1, math.ceil(to * self.planned - 1e-9))
        self.folder.mkdir(parents=True, exist_ok=True)
        now = run_identity(recipe.to_dict(), base.facts, base=setup.base_fingerprint)
        require_unchanged(changes_since(self.folder, now), self.folder)
        claim_output(self.folder, now)
        self.checkpoint = _checkpoint(self.folder, self.target, interrupt.say)
        self.trainer = SweepTrainer(setup, self.target, interrupt)
        # What its trainer has seeded just now, for itself.
        self.stream = Stream(base.device)
        self.diverged: str | None = None
        self._steps: Iterator[OptimizerStep] = iter(())
        self._step: OptimizerStep | None = None
        self._losses: list[torch.Tensor] = []

    @property
    def stands(self) -> bool:
        """Whether it has come as far as it goes."""
        if self.checkpoint is None:
            return False
        patience = self.configuration.recipe.early_stopping_patience
        early = patience and stopped_before(self.checkpoint, self.setup.arguments, patience)
        return step_of(self.checkpoint) >= self.target or bool(early)

    def train(self) -> None:
        """Trains by itself up to the target, or takes up what is there already."""
        if self.stands:
            assert self.checkpoint is not None
            self.trainer.take_up(self.checkpoint)
            return
        try:
            with self.setup.fast():
                self.trainer.train(resume_from_checkpoint=self.checkpoint and str(self.checkpoint))
        except DivergedError as error:
            self.diverged = str(error)

    # --- in a group ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Gets ready for its first step, or takes up what is there already."""
        with self.stream.drawing():
            if self.stands:
                assert self.checkpoint is not None
                self.trainer.take_up(self.checkpoint)
                return
            self._steps = self.trainer.optimizer_steps(self.checkpoint)
            self._step = next(self._steps, None)

    @property
    def next_batch(self) -> AdapterBatch | None:
        """Its next batch; None where it has come as far as it goes."""
        if self._step is None:
            return None
        return AdapterBatch(
            self.setup.model.active_adapter,
            self._step.batches[len(self._losses)],
            self._step.divisor,
            self.stream,
            self.setup.arguments.label_smoothing_factor,
        )

    def take(self, loss: torch.Tensor, seconds: float) -> None:
        """Goes on when the gradients of its batch are there.

        Args:
            loss: of the batch.
            seconds: its share of the time of the pass.

        Raises:
            StoppedError: stopping was asked for; the step is saved.
        """
        assert self._step is not None
        self.trainer.counts.seconds += seconds
        self._losses.append(loss)
        if len(self._losses) < len(self._step.batches):
            return
        step, losses, self._step, self._losses = self._step, self._losses, None, []
        try:
            with self.stream.drawing():
                self.trainer.finish_step(step, losses)
                self._step = next(self._steps, None)
        except DivergedError as error:
            self.diverged = str(error)

    def largest_batch(self) -> AdapterBatch:
        """The batch with most tokens of the first epoch, with no stream: it is for trials."""
        rows, batching = self.setup.data.train, self.setup.batching
        batches = batching.train_batches(rows, self.setup.arguments, epoch=0)
        largest = max(batches, key=lambda batch: sum(len(rows[i]) for i in batch))
        batch = BatchDataset(rows, batching, learning=True)[largest]
        placed = {name: tensor.to(self.base.device) for name, tensor in batch.items()}
        supervised = max(1, sum(rows[i].supervised for i in largest))
        return AdapterBatch(self.setup.model.active_adapter, placed, supervised)

    # --- behind training ------------------------------------------------------------------------

    def finish(self, losses: SplitLosses) -> Progress:
        """How far it has come; at the end of its run its adapter is written."""
        state, lines = self.trainer.state, self.trainer.lines
        for split, rows in losses.items():
            if self.diverged is None and not all(math.isfinite(nats) for nats, _ in rows):
                step = state.global_step
                self.diverged = f"the loss of the {split} rows is NaN or Inf at step {step}"
        if self.diverged is None and self.target == self.planned:
            self.setup.model.save_pretrained(self.folder)
            if self.trainer.start is not None:
                step, model = state.global_step, self.setup.model
                list(warn_of_unchanged(self.trainer.start, model, step, lines))
        return Progress(
            step=state.global_step,
            planned=self.planned,
            losses={} if self.diverged else losses,
            diverged=self.diverged,
            train_losses=[(e["step"], e["loss"]) for e in state.log_history if "loss" in e],
            seconds=self.trainer.counts.seconds,
        )


def advance_alone(
    base: SweepBase, configuration: Configuration, to: float, interrupt: Interrupt
) -> Progress:
    """Trains one configuration by itself, as `lorakit train` does.

    Raises:
        InputError: the adapter does not fit the base, or its folder is another run's.
        StoppedError: stopping was asked for; what was done is saved.
    """
    recipe = configuration.recipe
    begun = base.beginning(recipe)
    _require_one_process(recipe)
    if not evaluates_itself(recipe, training_arguments(recipe, held_out=True)):
        begun = replace(begun, data=replace(begun.data, eval=[], eval_samples=[]))
    setup = set_up(recipe, begun)
    try:
        member = Member(base, configuration, setup, to, interrupt)
        member.train()
        return member.finish({} if member.diverged else base.losses(setup.model))
    finally:
        if getattr(begun.model, "is_activation_checkpointing", False):
            begun.model.activation_checkpointing_disable()
        setup.model.unload()


def advance_group(
    base: SweepBase,
    configurations: Sequence[Configuration],
    to: float,
    interrupt: Interrupt,
    room: FindRoom,
) -> dict[str, Progress]:
    """Trains a group in shared passes.

    Args:
        room: the tokens of a pass, as `measure_room` finds them; None for all in one pass.

    Raises:
        InputError, StoppedError: as in `advance_alone`.
    """
    named = {f"part{i}": configuration for i, configuration in enumerate(configurations)}
    with base.adapted({name: c.recipe for name, c in named.items()}) as resident:
        members = {
            name: Member(base, own, _setup(base, own, resident, name), to, interrupt)
            for name, own in named.items()
        }
        _train(resident, members, room)
        healthy = [name for name, member in members.items() if member.diverged is None]
        losses = base.losses_of_each(resident, healthy) if healthy else {}
        return {m.configuration.name: m.finish(losses.get(n, {})) for n, m in members.items()}


def _train(resident: ResidentModel, members: Mapping[str, Member], room: FindRoom) -> None:
    """Trains all members up to their targets.

    Raises:
        StoppedError: stopping was asked for; every member has finished its step and saved it.
    """
    waiting = [member for member in members.values() if not member.stands]
    tokens = None
    if len(waiting) > 1:
        for member in waiting:
            enable_checkpointing(member.setup.model, member.setup.arguments)
        tokens = room([m.largest_batch() for m in waiting], lambda batches: _try(resident, batches))
    for member in members.values():
        member.begin()
    stopped: StoppedError | None = None
    while batches := [batch for m in members.values() if (batch := m.next_batch) is not None]:
        found: dict[str, tuple[torch.Tensor, float]] = {}
        for some in passes(batches, tokens):
            began = time.perf_counter()
            losses = resident.backward(some)
            _synchronize()
            each = (time.perf_counter() - began) / sum(batch.tokens for batch in some)
            for batch, loss in zip(some, losses, strict=True):
                found[batch.adapter] = loss, each * batch.tokens
        for name, (loss, seconds) in found.items():
            try:
                members[name].take(loss, seconds)
            except StoppedError as error:
                stopped = error
    if stopped is not None:
        raise stopped


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
    recipe, begun = configuration.recipe, base.begun
    _require_one_process(recipe)
    batching, notices = base.batching(recipe)
    arguments = training_arguments(recipe, held_out=False)
    return Setup(
        recipe=recipe,
        advice=[],
        inputs=begun,
        model=AdapterView(resident.model, adapter),  # type: ignore[arg-type]
        tokenizer=begun.tokenizer,
        data=replace(begun.data, eval=[], eval_samples=[]),
        arguments=arguments,
        batching=batching,
        compiled=False,
        base_fingerprint=base.fingerprint,
        notices=[*notices, *check_schedule(arguments, base.steps(recipe, arguments))],
    )


def _require_one_process(recipe: Recipe) -> None:
    """Raises InputError where several processes are asked for."""
    if asks_to_spread(recipe.training.model_extra or {}):
        raise InputError(
            "a sweep keeps its base in one process: leave out training.fsdp and deepspeed"
        )
    if training_arguments(recipe, held_out=False).world_size > 1:
        raise InputError("configurations train together in one process: start it without torchrun")


def _checkpoint(folder: Path, target: int, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: the last one up to the target, or else the last there is."""
    found = newest_whole(folder, at_most=target)
    for line in found.damaged:
        say(f"{folder.name}: {line}")
    return found.checkpoint or newest_whole(folder).checkpoint
