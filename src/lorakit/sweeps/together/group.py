"""One group of configurations: trained up to a share of their steps, evaluated, and written."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lorakit.adapters.manifest import write_manifest
from lorakit.lora.model import LoraModel
from lorakit.lora.streams import Stream
from lorakit.models.loss import SupervisedLoss
from lorakit.models.template_files import write_templates
from lorakit.sweeps.runner import Configuration, Progress
from lorakit.sweeps.together.batch import Part, step_together
from lorakit.sweeps.together.evaluate import RowLosses
from lorakit.sweeps.together.resident import Resident
from lorakit.sweeps.together.room import in_passes
from lorakit.sweeps.together.share import AdapterShare
from lorakit.sweeps.together.trainer import ConfigurationTrainer, DivergedError
from lorakit.sweeps.together.turns import Wait, take_turns
from lorakit.training.batching import BatchDataset
from lorakit.training.checkpoints import newest_whole, step_of
from lorakit.training.differences import run_identity
from lorakit.training.early_stopping import stopped_before
from lorakit.training.interrupt import Interrupt, StoppedError
from lorakit.training.output import changes_since, claim_output, require_unchanged
from lorakit.training.position import planned_steps
from lorakit.training.run import manifest_of
from lorakit.training.trainer import enable_checkpointing
from lorakit.training.unchanged import warn_of_unchanged

FindRoom = Callable[[Sequence[Part], Callable[[Sequence[Part]], None]], int | None]
"""Gives the tokens of a pass, out of the largest batches and a function that tries a pass out."""


class Member:
    """A configuration in a group: its trainer, and how far it is to go.

    Args:
        model: the base with the group's adapters.
        adapter: the name of its own there.
        to: the share of its planned steps at which it stops.
        alone: it is the only one of its group, and has the model for itself.
    """

    def __init__(
        self,
        resident: Resident,
        model: LoraModel,
        adapter: str,
        configuration: Configuration,
        to: float,
        loss: SupervisedLoss,
        interrupt: Interrupt,
        *,
        alone: bool,
    ) -> None:
        self.resident, self.adapter, self.configuration = resident, adapter, configuration
        recipe = configuration.recipe
        self.folder = Path(recipe.output_dir)
        own = model if alone else AdapterShare(model, adapter)
        self.setup = resident.setup(recipe, own)
        args, rows = self.setup.arguments, self.setup.data.train
        batches = self.setup.batching.train_batches(rows, args, epoch=0)
        self.planned = planned_steps(args, len(batches))
        # As a share of a whole number of steps may come out a little above it.
        self.target = max(1, math.ceil(to * self.planned - 1e-9))
        self.folder.mkdir(parents=True, exist_ok=True)
        now = run_identity(recipe.to_dict(), resident.facts, base=self.setup.base_fingerprint)
        require_unchanged(changes_since(self.folder, now), self.folder)
        claim_output(self.folder, now)
        self.checkpoint = _checkpoint(self.folder, self.target, interrupt.say)
        self.trainer = ConfigurationTrainer(
            self.setup, loss, self.target, interrupt, own_clock=alone
        )
        # What its trainer has seeded just now, for itself.
        self.stream = Stream(resident.device)
        self.smoothing: float = args.label_smoothing_factor
        self.diverged: str | None = None

    @property
    def stands(self) -> bool:
        """Whether it has come as far as it is to go."""
        if self.checkpoint is None:
            return False
        patience = self.configuration.recipe.early_stopping_patience
        early = patience and stopped_before(self.checkpoint, self.setup.arguments, patience)
        return step_of(self.checkpoint) >= self.target or bool(early)

    def make_ready(self) -> None:
        """Switches on what training does on the model, as its trainer will."""
        enable_checkpointing(self.setup.model, self.setup.arguments)

    def largest_part(self) -> Part:
        """The batch with most tokens of the first epoch, with no stream: it is for trials."""
        rows, batching = self.setup.data.train, self.setup.batching
        batches = batching.train_batches(rows, self.setup.arguments, epoch=0)
        largest = max(batches, key=lambda batch: sum(len(rows[i]) for i in batch))
        batch = BatchDataset(rows, batching, learning=True)[largest]
        placed = {name: tensor.to(self.resident.device) for name, tensor in batch.items()}
        return Part(self.adapter, placed, max(1, sum(rows[i].supervised for i in largest)))

    def train(self, wait: Wait | None = None) -> None:
        """Trains up to the target, or takes up what is there already.

        Args:
            wait: gives the loss of a `Part` out of a batch that others share.
        """
        if wait is not None:
            self.trainer.join = lambda batch, divisor: wait(
                Part(self.adapter, batch, divisor, self.stream, self.smoothing)
            )
        if self.stands:
            assert self.checkpoint is not None
            self.trainer.take_up(self.checkpoint)
        else:
            self.trainer.train(resume_from_checkpoint=self.checkpoint and str(self.checkpoint))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is random and what takes time within this block is this configuration's."""
        began = time.perf_counter()
        with self.stream.drawing():
            yield
        self.trainer.counts.seconds += time.perf_counter() - began

    def progress(self, losses: Mapping[str, RowLosses]) -> Progress:
        """How far it has come."""
        state = self.trainer.state
        return Progress(
            step=state.global_step,
            planned=self.planned,
            losses=losses,
            diverged=self.diverged,
            train_losses=[(e["step"], e["loss"]) for e in state.log_history if "loss" in e],
            seconds=self.trainer.counts.seconds,
        )

    def finish(self, base: Mapping[str, RowLosses], tuned: Mapping[str, RowLosses]) -> None:
        """Writes the adapter's files, and the record of how it came about."""
        if self.setup.begun.templates is not None:  # so that chat and serve use the same
            write_templates(self.folder, self.setup.begun.templates)
        self.setup.model.save_pretrained(self.folder)
        trainer, seconds = self.trainer, self.trainer.counts.seconds
        if trainer.start is not None:
            model, step = self.setup.model, trainer.state.global_step
            list(warn_of_unchanged(trainer.start, model, step, trainer.lines))
        manifest = manifest_of(
            self.setup, trainer, _mean(base), _mean(tuned), trainer.lines, seconds
        )
        write_manifest(self.folder, manifest)


def advance_group(
    resident: Resident,
    configurations: Sequence[Configuration],
    to: float,
    interrupt: Interrupt,
    room: FindRoom,
) -> dict[str, Progress]:
    """Trains a group in shared batches, or a single configuration by itself.

    Args:
        room: the tokens of a pass, as `measure_room` finds them; None for all in one pass.

    Raises:
        InputError: an adapter does not fit the base, or a folder is another run's.
        StoppedError: stopping was asked for; what was done is saved.
    """
    alone = len(configurations) == 1
    adapters = ["default"] if alone else [f"part{i}" for i in range(len(configurations))]
    recipes = {a: c.recipe for a, c in zip(adapters, configurations, strict=True)}
    with resident.adapted(recipes) as model:
        loss = SupervisedLoss(model)
        members = {
            adapter: Member(
                resident, model, adapter, configuration, to, loss, interrupt, alone=alone
            )
            for adapter, configuration in zip(adapters, configurations, strict=True)
        }
        if alone:
            _train_alone(members["default"])
        else:
            _train_together(resident, model, loss, members, room)
        return _evaluated(resident, model, loss, members)


def _train_alone(member: Member) -> None:
    try:
        member.train()
    except DivergedError as error:
        member.diverged = str(error)


def _train_together(
    resident: Resident,
    model: LoraModel,
    loss: SupervisedLoss,
    members: Mapping[str, Member],
    room: FindRoom,
) -> None:
    def run(parts: Sequence[Part]) -> dict[str, torch.Tensor]:
        if not model.training:  # setting it goes through all modules
            model.train()
        found = step_together(model, loss, parts, resident.pad_token_id)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is timed must have happened
        return found

    def try_out(parts: Sequence[Part]) -> None:
        with torch.random.fork_rng():
            run(parts)
        model.zero_grad()

    def step(requests: Mapping[str, Part]) -> Mapping[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for parts in in_passes(list(requests.values()), tokens):
            began = time.perf_counter()
            found |= run(parts)
            seconds = time.perf_counter() - began
            whole = sum(part.tokens for part in parts)
            for part in parts:
                members[part.name].trainer.counts.seconds += seconds * part.tokens / whole
        return found

    waiting = {name: member for name, member in members.items() if not member.stands}
    tokens = None
    if len(waiting) > 1:
        for member in waiting.values():
            member.make_ready()
        tokens = room([member.largest_part() for member in waiting.values()], try_out)
    bodies: dict[str, Callable[[Wait], None]] = {name: m.train for name, m in members.items()}
    with _quick_collections():
        ended = take_turns(
            bodies, step, lambda name: members[name].turn(), (DivergedError, StoppedError)
        )
    for name, error in ended.items():
        if isinstance(error, DivergedError):
            members[name].diverged = str(error)
    if stopped := [error for error in ended.values() if isinstance(error, StoppedError)]:
        raise stopped[0]


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Within this block garbage is looked for among new objects alone.

    Each trainer that begins has accelerate collect all garbage, which takes as long as there are
    objects, and most of them are the libraries' own.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _evaluated(
    resident: Resident, model: LoraModel, loss: SupervisedLoss, members: Mapping[str, Member]
) -> dict[str, Progress]:
    """The held-out losses of those that have not diverged; who is at the end is written."""
    recipe = next(iter(members.values())).configuration.recipe
    healthy = [name for name, member in members.items() if member.diverged is None]
    found: dict[str, dict[str, RowLosses]] = {}
    if healthy:
        found = dict(zip(healthy, resident.losses(model, loss, healthy, recipe), strict=True))
    for name in healthy:
        member, losses = members[name], found[name]
        for split, rows in losses.items():
            if not all(math.isfinite(nats) for nats, _ in rows):
                step = member.trainer.state.global_step
                member.diverged = f"the loss of the {split} rows is no number at step {step}"
                found[name] = {}
        if member.diverged is None and member.target == member.planned:
            member.finish(resident.base_losses(model, loss, recipe), losses)
    return {m.configuration.name: m.progress(found.get(n, {})) for n, m in members.items()}


def _checkpoint(folder: Path, target: int, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from: the last one up to the target, or else the last there is."""
    found = newest_whole(folder, at_most=target)
    for line in found.damaged:
        say(f"{folder.name}: {line}")
    return found.checkpoint or newest_whole(folder).checkpoint


def _mean(losses: Mapping[str, RowLosses]) -> dict[str, float]:
    rows = [row for split in losses.values() for row in split]
    tokens = sum(count for _, count in rows)
    return {"loss": sum(nats for nats, _ in rows) / tokens} if tokens else {}
