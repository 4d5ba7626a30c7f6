"""Trains the configurations of a sweep in this process, in groups that share passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from lorakit.engine.shared_pass import AdapterBatch
from lorakit.errors import InputError, listed
from lorakit.sweeps.base import SweepBase
from lorakit.sweeps.group import advance_alone, advance_group
from lorakit.sweeps.records import Progress
from lorakit.sweeps.room import Room, measure_room
from lorakit.sweeps.sharing import why_alone
from lorakit.sweeps.space.configurations import Configuration
from lorakit.training.forecast import TIGHT
from lorakit.training.interrupt import Interrupt
from lorakit.training.machine import memory_mb, used_memory_mb
from lorakit.training.setup import training_arguments

_ONLY_BATCHES = ("padding_free", "packing", "share_prefixes")  # of data: what is no other row

FOR_ADAPTERS = 0.5
"""Of the free memory: passes need the rest."""

Kind = tuple[Any, ...]
"""What configurations must have in common to share a pass."""


class LocalRunner:
    """A sweep's runner: the data are tokenised once, the base is held once.

    Args:
        base: model and rows.
        at_once: so many configurations share a pass, as one; None makes groups as large as
            memory allows, and measures how much of them should go through the model at a time.
        together: False trains one configuration after the other.
        say: shows a line to the user.
    """

    def __init__(
        self,
        base: SweepBase,
        *,
        at_once: int | None = None,
        together: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.base, self.at_once, self.say = base, at_once, say
        self.together = together and base.shares_passes
        if together and not self.together:
            objective = base.begun.objective
            what = objective.name if objective.task_type == "CAUSAL_LM" else objective.task_type
            say(f"configurations of {what} are trained one after the other")
        self._said: set[str] = set()
        self._rooms: dict[Kind, Room] = {}

    def advance(self, configurations: Sequence[Configuration], to: float) -> dict[str, Progress]:
        """Trains each to the share `to` of its steps; see `search.Runner`.

        Raises:
            InputError: a configuration does not fit the base, or its folder is another run's.
            StoppedError: Ctrl-C or SIGTERM; every step was finished and saved.
        """
        _require_one_base(configurations)
        groups, alone = self._groups(configurations) if self.together else ([], configurations)
        interrupt = Interrupt(self.say)
        found: dict[str, Progress] = {}
        with interrupt.listening():
            for kind, group in groups:
                room = partial(self._room, kind)
                found |= advance_group(self.base, group, to, interrupt, room)
            for one in alone:
                found[one.name] = advance_alone(self.base, one, to, interrupt)
        return {c.name: found[c.name] for c in configurations}

    def _groups(
        self, configurations: Sequence[Configuration]
    ) -> tuple[list[tuple[Kind, list[Configuration]]], list[Configuration]]:
        """Those that share passes, of about the same number of batches; and those that cannot."""
        alone, shared = [], []
        for configuration in configurations:
            recipe = configuration.recipe
            args = training_arguments(recipe, held_out=True)
            config = self.base.begun.lora_config(recipe)
            if reason := why_alone(self.base.begun.model, recipe, config, args):
                self._say_once(f"{configuration.name} is trained by itself: {reason}")
                alone.append(configuration)
                continue
            padded = self.base.batching(recipe)[0].pad_token_id is not None
            options = str(sorted((args.activation_checkpointing_kwargs or {}).items()))
            kind = (padded, bool(args.activation_checkpointing), options)
            batches = self.base.steps(recipe, args) * args.gradient_accumulation_steps
            shared.append((kind, batches, configuration))
        shared.sort(key=lambda entry: entry[:2])
        groups = []
        for kind, same in groupby(shared, key=lambda entry: entry[0]):
            members = [configuration for _, _, configuration in same]
            size = self.at_once or self._most_at_once(members)
            # As even as can be: a group of one has nobody to share its passes with.
            count = -(-len(members) // size)
            for i in range(count):
                begin, end = (len(members) * n // count for n in (i, i + 1))
                groups.append((kind, members[begin:end]))
        return groups, alone

    def _most_at_once(self, members: Sequence[Configuration]) -> int:
        """How many of these the memory holds, with gradients and the optimizer's two averages."""
        largest = max(self.base.trained_parameters(c.recipe) for c in members)
        each = 16e-6 * largest  # MB; adapters are float32
        free = TIGHT * memory_mb() - used_memory_mb()
        most = max(1, int(FOR_ADAPTERS * free / each))
        if most < len(members):
            self._say_once(
                f"{most} of {len(members)} configurations train at once: each takes "
                f"{each:,.0f} MB beside the base, of {free / 1e3:.1f} GB that are free"
            )
        return most

    def _room(
        self,
        kind: Kind,
        batches: Sequence[AdapterBatch],
        run: Callable[[Sequence[AdapterBatch]], None],
    ) -> int | None:
        """The tokens that go through the model at a time, measured once for a kind of batches."""
        if self.at_once is not None:
            return None
        if kind not in self._rooms:
            self._rooms[kind] = measure_room(batches, run)
            self.say(f"{len(batches)} configurations train at once; {self._rooms[kind].line}")
        return self._rooms[kind].tokens

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)


def _require_one_base(configurations: Sequence[Configuration]) -> None:
    """Raises InputError where a configuration needs another model or other rows."""

    def shared(configuration: Configuration) -> dict[str, Any]:
        recipe = configuration.recipe
        kept = {"model": recipe.model, "dtype": recipe.dtype}
        data = recipe.data.model_dump(mode="json")
        return kept | {f"data.{k}": data[k] for k in data if k not in _ONLY_BATCHES}

    for configuration in configurations[1:]:
        first, own = shared(configurations[0]), shared(configuration)
        if other := [key for key in first if first[key] != own[key]]:
            raise InputError(
                f"{configuration.name} differs in {listed(other)}: configurations train together "
                "on one model and the same rows"
            )
