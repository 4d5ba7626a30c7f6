"""Trains the configurations of a sweep in groups that share batches of one resident base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from lorakit.data.masking import TokenizedRow
from lorakit.errors import InputError, listed
from lorakit.objectives.objective import TrainingInputs
from lorakit.sweeps.runner import Configuration, Progress
from lorakit.sweeps.together.alone import why_alone
from lorakit.sweeps.together.batch import Part
from lorakit.sweeps.together.group import advance_group
from lorakit.sweeps.together.resident import Resident
from lorakit.sweeps.together.room import Room, measure_room
from lorakit.training.forecast import TIGHT
from lorakit.training.interrupt import Interrupt
from lorakit.training.machine import memory_mb, used_memory_mb
from lorakit.training.position import planned_steps
from lorakit.training.setup import training_arguments

_ONLY_BATCHES = ("padding_free", "packing", "share_prefixes")  # of data: what is no other row

FOR_ADAPTERS = 0.5
"""Of the free memory: passes need the rest."""

Kind = tuple[Any, ...]
"""What configurations must have in common to share a batch."""


class TogetherRunner:
    """A sweep's runner: the data are tokenised once, the base is held once.

    Args:
        begun: the base model and the rows, as `tasks.begin` gives them for the sweep's recipe.
        splits: held-out rows, by the names under which their losses come back.
        at_once: so many configurations share a batch, as one; None makes groups as large as
            memory allows, and measures how much of them should go through the model at a time.
        say: shows a line to the user.

    Raises:
        InputError: the task is none of a causal language model.
    """

    def __init__(
        self,
        begun: TrainingInputs,
        splits: Mapping[str, Sequence[TokenizedRow]],
        *,
        at_once: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        if begun.objective.name != "sft":
            raise InputError(
                "configurations train together as causal language models alone: "
                "train those of other tasks one by one"
            )
        self.resident = Resident(begun, splits)
        self.at_once, self.say = at_once, say
        self._said: set[str] = set()
        self._rooms: dict[Any, Room] = {}

    def advance(self, configurations: Sequence[Configuration], to: float) -> dict[str, Progress]:
        """Trains each to the share `to` (0 < to <= 1) of its own planned steps.

        Raises:
            InputError: a configuration does not fit the base, or its folder is another run's.
            StoppedError: Ctrl-C or SIGTERM; every step was finished and saved.
        """
        _require_one_base(configurations)
        interrupt = Interrupt(self.say)
        found: dict[str, Progress] = {}
        with interrupt.listening():
            for kind, group in self._groups(configurations):
                room = partial(self._room, kind)
                found |= advance_group(self.resident, group, to, interrupt, room)
        return {c.name: found[c.name] for c in configurations}

    def _groups(
        self, configurations: Sequence[Configuration]
    ) -> list[tuple[Kind, list[Configuration]]]:
        """Those that share batches, of about the same number of batches; others by themselves."""
        alone, shared = [], []
        for configuration in configurations:
            recipe = configuration.recipe
            args = training_arguments(recipe, held_out=True)
            config = self.resident.begun.lora_config(recipe)
            if reason := why_alone(self.resident.model, recipe, config, args):
                self._say_once(f"{configuration.name} is trained by itself: {reason}")
                alone.append((("alone",), [configuration]))
                continue
            batching, _ = self.resident.batching(recipe)
            batches = len(batching.train_batches(self.resident.begun.data.train, args, epoch=0))
            steps = planned_steps(args, batches) * args.gradient_accumulation_steps
            padded = batching.pad_token_id is not None
            options = str(sorted((args.activation_checkpointing_kwargs or {}).items()))
            kind = (padded, bool(args.activation_checkpointing), options)
            shared.append((kind, steps, configuration))
        shared.sort(key=lambda entry: entry[:2])
        groups = []
        for kind, same in groupby(shared, key=lambda entry: entry[0]):
            members = [configuration for _, _, configuration in same]
            size = self.at_once or self._most_at_once(members)
            # As even as can be: a group of one has nobody to share its batches with.
            count = -(-len(members) // size)
            for i in range(count):
                begin, end = (len(members) * n // count for n in (i, i + 1))
                groups.append((kind, members[begin:end]))
        return groups + alone

    def _most_at_once(self, members: Sequence[Configuration]) -> int:
        """How many of these the memory holds, with gradients and the optimiser's two averages."""
        largest = max(self.resident.factor_parameters(c.recipe) for c in members)
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
        self, kind: Kind, parts: Sequence[Part], run: Callable[[Sequence[Part]], None]
    ) -> int | None:
        """The tokens that go through the model at a time, measured once for a kind of batches."""
        if self.at_once is not None:
            return None
        if kind not in self._rooms:
            self._rooms[kind] = measure_room(parts, run)
            self.say(f"{len(parts)} configurations train at once; {self._rooms[kind].line}")
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
