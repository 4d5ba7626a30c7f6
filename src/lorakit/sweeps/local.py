"""Trains the configurations of a sweep in this process, in groups that share passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any

from torch import nn
from transformers import TrainingArguments

from lorakit.engine.shared_pass import AdapterBatch, why_not_shared
from lorakit.errors import InputError, listed
from lorakit.lora.config import LoraConfig
from lorakit.models.loaded import has_dropout
from lorakit.rewards.reward_specs import adapters_in
from lorakit.sweeps.group import advance_alone, advance_group, evaluates_itself
from lorakit.sweeps.pass_size import PassSize, measure_pass_size
from lorakit.sweeps.records import Progress
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.sweep_base import SweepBase
from lorakit.training.adapter_settings import adapter_config
from lorakit.training.forecast import TIGHT
from lorakit.training.interrupt import Interrupt
from lorakit.training.machine import memory_mb, used_memory_mb
from lorakit.training.recipe import Recipe
from lorakit.training.setup import training_arguments

_ONLY_BATCHES = {"padding_free", "packing", "share_prefixes"}  # of data: rows are the same

FOR_ADAPTERS = 0.5  # of the free memory: passes need the rest

Kind = tuple[Any, ...]
"""What configurations must have in common to share a pass."""


class LocalRunner:
    """A sweep's runner: the data are tokenised once, the base is held once.

    Args:
        at_once: how many configurations share a pass; None makes groups as large as
            memory allows, and measures how much of them should go through the model at a time.
        together: False trains one configuration after the other.
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
            objective = base.inputs.objective
            what = objective.name if objective.task_type == "CAUSAL_LM" else objective.task_type
            say(f"configurations of {what} are trained one after the other")
        self._said: set[str] = set()
        self._pass_sizes: dict[Kind, PassSize] = {}

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
                pass_size = partial(self._pass_size, kind)
                found |= advance_group(self.base, group, to, interrupt, pass_size)
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
            config = adapter_config(recipe, self.base.inputs)
            if reason := why_alone(self.base.inputs.model, recipe, config, args):
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
            ends = [len(members) * n // count for n in range(count + 1)]
            groups += [(kind, members[begin:end]) for begin, end in pairwise(ends)]
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

    def _pass_size(
        self,
        kind: Kind,
        batches: Sequence[AdapterBatch],
        run: Callable[[Sequence[AdapterBatch]], None],
    ) -> int | None:
        """The tokens that go through the model at a time, measured once for a kind of batches."""
        if self.at_once is not None:
            return None
        if kind not in self._pass_sizes:
            self._pass_sizes[kind] = measure_pass_size(batches, run)
            self.say(f"{len(batches)} configurations train at once; {self._pass_sizes[kind].line}")
        return self._pass_sizes[kind].tokens

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)


def why_alone(
    base: nn.Module, recipe: Recipe, config: LoraConfig, args: TrainingArguments
) -> str | None:
    """Why this configuration has to train by itself; None where it can share passes."""
    if has_dropout(base):  # drawn for a whole batch, and so differently in a shared one
        return "the base model has dropout of its own"
    if args.neftune_noise_alpha:
        return "neftune_noise_alpha draws noise for a whole batch"
    if args.report_to:
        return f"{args.report_to[0]} follows one run of a process at a time"
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        return "use_reentrant recomputes without the route of a shared pass"
    if not recipe.make_objective().shares_passes:
        return "its loss needs more than the log-probabilities of tokens"
    return evaluates_itself(recipe, args) or why_not_shared(base, config)


def require_sweepable(recipe: Recipe) -> None:
    """Raises InputError where a run of this recipe needs more than the resident model."""
    objective = recipe.make_objective()
    if objective.rollouts != "engine":
        raise InputError(
            "a sweep samples completions by the resident model, one turn each: objective."
            "environment, tools and rollouts are for lorakit train"
        )
    if adapters := adapters_in(getattr(objective.settings, "rewards", ())):
        raise InputError(
            f"objective.rewards: the reward adapter {adapters[0]} lies on the base of one run, "
            "which a sweep's configurations share: train each configuration with lorakit train"
        )


def _require_one_base(configurations: Sequence[Configuration]) -> None:
    """Raises InputError where a configuration needs another model or other rows."""

    def shared(configuration: Configuration) -> dict[str, Any]:
        recipe = configuration.recipe
        data = recipe.data.model_dump(mode="json", exclude=_ONLY_BATCHES)
        kept = {f"data.{key}": value for key, value in data.items()}
        return {"model": recipe.model, "dtype": recipe.dtype, **kept}

    for configuration in configurations:
        require_sweepable(configuration.recipe)
    for configuration in configurations[1:]:
        first, own = shared(configurations[0]), shared(configuration)
        if other := [key for key in first if first[key] != own[key]]:
            raise InputError(
                f"{configuration.name} differs in {listed(other)}: configurations train together "
                "on one model and the same rows"
            )
