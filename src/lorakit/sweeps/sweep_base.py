"""What a sweep's configurations share: one base model, rows tokenised once, held-out splits."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from lorakit.adapters.open import with_frozen
from lorakit.data.findings import AnySample
from lorakit.data.grouping import AT_ONCE
from lorakit.data.masking import TokenizedRow
from lorakit.engine.resident import ResidentModel
from lorakit.engine.shared_pass import AdapterBatch
from lorakit.errors import InputError
from lorakit.evaluation.bootstrap import Interval, loss_interval
from lorakit.evaluation.held_out import (
    Judge,
    RowLosses,
    Sums,
    batch_losses,
    know_constants,
    row_sums,
    sums_beforehand,
)
from lorakit.lora import LoraModel
from lorakit.lora.parameters import count_parameters
from lorakit.lora.routing import Route
from lorakit.models.fused import fused
from lorakit.models.lines import Lines
from lorakit.models.load import best_device, torch_dtype
from lorakit.models.loss import SupervisedLoss
from lorakit.objectives.batch_sums import added, with_sums
from lorakit.objectives.objective import Objective, TrainingInputs
from lorakit.progress import task
from lorakit.sweeps.space.configurations import changed
from lorakit.training.advice import advised
from lorakit.training.batching import Batching, choose_batching
from lorakit.training.machine import settle_in
from lorakit.training.position import planned_steps
from lorakit.training.recipe import Recipe
from lorakit.training.setup import load_inputs, wished_device
from lorakit.training.stages import load_beside

SELECTION, REPORT = "selection", "report"

FEWEST = 8  # held-out prompts of a split: a bootstrap of fewer says nothing

SplitLosses = dict[str, RowLosses]
"""By split, the losses of its rows."""


@dataclass(frozen=True)
class HeldOut:
    """What the held-out rows gave with one adapter.

    Args:
        sums: by split, of each row its `Loss.sums`, by the objective of the sweep's recipe.
        scores: `loss` and scores of all rows, by the configuration's own settings.
    """

    sums: dict[str, list[Sums]]
    scores: dict[str, float]

    @property
    def losses(self) -> SplitLosses:
        """By split, the losses of its rows."""
        return {
            split: [(float(row["total"]), int(row["count"])) for row in rows]
            for split, rows in self.sums.items()
        }

    @property
    def metrics(self) -> dict[str, dict[str, list[Any]]]:
        """By split and name, the metric of each row beside its loss, as plain numbers."""
        return {
            split: {
                name: [row[name].tolist() for row in rows]
                for name in rows[0]
                if name not in ("total", "count")
            }
            for split, rows in self.sums.items()
        }


@dataclass(frozen=True)
class Split:
    """Held-out rows with their samples; `units[i]` numbers the prompt of row i."""

    rows: list[TokenizedRow]
    samples: list[AnySample]
    units: list[int]

    @property
    def prompts(self) -> int:
        """How many different prompts there are."""
        return max(self.units, default=-1) + 1


class SweepBase:
    """A base model and its rows, for all configurations of a sweep.

    Args:
        recipe: of the sweep, without its changes.
        splits: held-out rows by name.
        seed: of the draws that intervals are taken from.

    Attributes:
        facts: what the rows were read from, as the record has it.
    """

    def __init__(
        self, recipe: Recipe, inputs: TrainingInputs, splits: Mapping[str, Split], seed: int = 0
    ) -> None:
        self.recipe, self.inputs, self.splits, self.seed = recipe, inputs, splits, seed
        self.device: torch.device = next(inputs.model.parameters()).device
        self.fingerprint = inputs.base_fingerprint
        pad = inputs.tokenizer.pad_token_id
        self.pad_token_id: int = pad if isinstance(pad, int) else 0
        self.parameters = count_parameters(inputs.model)[1]
        self.facts = [fact.to_dict() for fact in inputs.data.facts]
        self.notices = [*inputs.data.notices, *(f.line for f in inputs.data.findings if f.count)]
        self._lines = Lines(inputs.model)
        self._seed = recipe.training.seed  # a new head's values are drawn with it
        self._trained: dict[str, int] = {}

    @property
    def ground(self) -> dict[str, Any]:
        """What rows, base and start are, for the sweep's record."""
        start, teacher = self.inputs.start, self.inputs.teacher
        found: dict[str, Any] = {"data": self.facts, "base": self.fingerprint}
        found |= {"parent": start.record.sha256} if start else {}
        return found | ({"teacher": teacher.sha256} if teacher else {})

    @property
    def shares_passes(self) -> bool:
        """Whether configurations of this task can share a pass."""
        inputs = self.inputs
        alone = inputs.start or inputs.own_tokenizer or inputs.has_pictures
        return inputs.objective.shares_passes and not alone

    def complete(self, recipe: Recipe) -> Recipe:
        """`recipe` with what it leaves open filled in, and the rows of the sweep held out."""
        full, _ = advised(recipe, self.parameters, len(self.inputs.data.train))
        if full.data_seed != self.recipe.data_seed:
            full = full.filled_in({"data.seed": self.recipe.data_seed})
        return full

    def inputs_for(self, recipe: Recipe) -> TrainingInputs:
        """The rows and the base for a configuration, and the objective with its own settings.

        A base with a new head is loaded again for another seed, which draws the head's values.
        """
        if self.inputs.new_modules and recipe.training.seed != self._seed:
            fresh = _load(changed(self.recipe, {"training.seed": recipe.training.seed}))
            self.inputs = replace(self.inputs, model=fresh.model)
            self._seed = recipe.training.seed
        inputs, settings = self.inputs, recipe.make_objective().settings
        if settings == inputs.objective.settings:
            return inputs
        return replace(inputs, objective=inputs.objective.with_settings(settings))

    def batching(
        self, recipe: Recipe, objective: Objective | None = None
    ) -> tuple[Batching, list[str]]:
        """How rows become batches, with a notice where that is not as the recipe has it.

        Args:
            objective: whose tensors are added to those of the rows; None for the sweep's.
        """
        inputs = self.inputs
        batching, notices = choose_batching(recipe, self._lines, self.pad_token_id, inputs.collator)
        return replace(batching, to_batch=(objective or inputs.objective).to_batch), notices

    def steps(self, recipe: Recipe, args: TrainingArguments) -> int:
        """The optimizer steps of a run of `recipe`."""
        batches = self.batching(recipe)[0].train_batches(self.inputs.data.train, args, epoch=0)
        return planned_steps(args, len(batches))

    @contextmanager
    def adapted(self, recipes: Mapping[str, Recipe]) -> Iterator[ResidentModel]:
        """The base with an adapter for each recipe, by name, started as in a run of its own.

        After the block the base is as it was. Raises InputError where an adapter does not fit.
        """
        resident = ResidentModel(self.inputs.model, self.pad_token_id)
        try:
            for name, recipe in recipes.items():
                resident.create(name, self.inputs.lora_config(recipe), recipe.training.seed)
            with fused(resident.model):
                yield resident
        finally:
            self.stop_checkpointing()
            if resident.adapters:
                resident.model.unload()

    def stop_checkpointing(self) -> None:
        """Leaves no activation checkpointing behind in the base."""
        if getattr(self.inputs.model, "is_activation_checkpointing", False):
            self.inputs.model.activation_checkpointing_disable()

    @contextmanager
    def with_adapter(self, folder: Path, recipe: Recipe) -> Iterator[LoraModel]:
        """The base with the adapter in `folder`, to evaluate; bare again after the block."""
        model = with_frozen(self.inputs_for(recipe).model, folder).eval()
        start = self.inputs.start
        load_beside(model, self.inputs.objective, start.folder if start else None)
        try:
            yield model
        finally:
            model.unload()

    def trained_parameters(self, recipe: Recipe) -> int:
        """How many parameters a configuration trains; they are counted without being made."""
        key = json.dumps(recipe.lora, sort_keys=True, default=str)
        if key not in self._trained:
            inputs = self.inputs_for(recipe)
            model = LoraModel(inputs.model, inputs.lora_config(recipe), low_cpu_mem_usage=True)
            try:
                self._trained[key] = model.get_nb_trainable_parameters()[0]
            finally:
                model.unload()
        return self._trained[key]

    # --- held-out rows ----------------------------------------------------------------------

    @cached_property
    def bare(self) -> HeldOut:
        """What the held-out rows give without an adapter."""
        with self._without_adapter() as model:
            return self.held_out(model)

    @property
    def bare_losses(self) -> SplitLosses:
        """The losses of the held-out rows without an adapter."""
        return self.bare.losses

    @contextmanager
    def _without_adapter(self) -> Iterator[nn.Module]:
        """The base without an adapter, beside a teacher where there is one."""
        if self.inputs.teacher is None:
            yield self.inputs.model
            return
        model = LoraModel(self.inputs.model, None).eval()
        load_beside(model, self.inputs.objective, None)
        try:
            yield model
        finally:
            model.unload()

    def interval(
        self, losses: SplitLosses, split: str, minus: SplitLosses | None = None
    ) -> Interval:
        """The mean loss of a split's rows, less that of others of the same rows."""
        others = minus[split] if minus else None
        return loss_interval(losses[split], self.splits[split].units, self.seed, others)

    def losses(self, model: nn.Module) -> SplitLosses:
        """The losses of the held-out rows, with the adapters that are active in `model`."""
        return self.held_out(model).losses

    def held_out(self, model: nn.Module, own: Objective | None = None) -> HeldOut:
        """Losses and scores of the held-out rows, with the adapters that are active in `model`.

        Args:
            own: the objective of a configuration; None for the sweep's.
        """
        objectives = self._objectives(own)
        if not self.shares_passes:
            return self._put_together([self._one_by_one(model, one) for one in objectives], own)
        loss = SupervisedLoss(model)
        judges = [self._judge(one, model) for one in objectives]
        return self._put_together(
            self._judged(model, lambda b: [loss.of_tokens(model, b)] * len(judges), judges), own
        )

    def held_out_of_each(
        self, resident: ResidentModel, own: Mapping[str, Objective]
    ) -> dict[str, HeldOut]:
        """The same with each of these adapters, by the name of which there is its objective.

        As many of them share a pass as fit into `AT_ONCE` tokens.
        """
        names, judges = list(own), []
        for name, objective in own.items():
            with resident.model.routing.using(Route(shared=(name,))):
                judges.append([self._judge(o, resident.model) for o in self._objectives(objective)])

        def token_losses(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            several = max(1, AT_ONCE // batch["input_ids"].numel())
            found = [
                losses
                for at in range(0, len(names), several)
                for losses in resident.token_losses(
                    [AdapterBatch(name, batch) for name in names[at : at + several]]
                )
            ]
            return [losses for i, losses in enumerate(found) for _ in judges[i]]

        flat = [judge for several in judges for judge in several]
        found = iter(self._judged(resident.model, token_losses, flat))
        return {
            name: self._put_together([*islice(found, len(judges[i]))], own[name])
            for i, name in enumerate(names)
        }

    def bare_scores(self, own: Objective) -> dict[str, float]:
        """Loss and scores of all held-out rows without an adapter, by these settings."""
        if self._objectives(own) == [self.inputs.objective]:
            return self.bare.scores
        if not self.shares_passes:
            with self._without_adapter() as model:
                return self.held_out(model, own).scores
        judge, tokens = self._judge(own, self.inputs.model), self._bare_tokens
        sums: Sums = {}
        with torch.no_grad():
            for row in self._rows:
                sums = added(sums, judge(row, tokens[id(row)]))
        return own.held_out(sums)

    @cached_property
    def _bare_tokens(self) -> dict[int, torch.Tensor]:
        """The losses of the supervised tokens of each held-out row, by the row's id."""
        found: dict[int, torch.Tensor] = {}
        model = self.inputs.model
        loss = SupervisedLoss(model)

        def keep(row: TokenizedRow, losses: torch.Tensor) -> Sums:
            found[id(row)] = losses
            return {}

        self._judged(model, lambda batch: [loss.of_tokens(model, batch)], [keep])
        return found

    @cached_property
    def _rows(self) -> list[TokenizedRow]:
        return [row for part in self.splits.values() for row in part.rows]

    def _objectives(self, own: Objective | None) -> list[Objective]:
        """The sweep's objective, which all are compared by, and one with other settings."""
        common = self.inputs.objective
        other = own is not None and own.settings != common.settings
        return [common, own] if other and own is not None else [common]

    def _judged(
        self,
        model: nn.Module,
        token_losses: Callable[[dict[str, torch.Tensor]], list[torch.Tensor]],
        judges: Sequence[Judge],
    ) -> list[list[Sums]]:
        """What each of `judges` makes of each held-out row; see `evaluation.held_out.row_sums`."""
        batching, _ = self.batching(self.recipe)
        collate, rows = batching.collator(learning=False), self._rows
        batches = [
            [begin + i for i in batch]
            for begin, part in zip(self._begins, self.splits.values(), strict=True)
            for batch in batching.held_out_batches(part.rows)
        ]
        return row_sums(model, rows, batches, collate, token_losses, judges)

    @cached_property
    def _begins(self) -> list[int]:
        """Where the rows of each split begin in those of all."""
        return [*accumulate((len(part.rows) for part in self.splits.values()), initial=0)][:-1]

    def _judge(self, objective: Objective, model: nn.Module) -> Judge:
        """How a row is judged by the losses of its tokens under the adapter in force."""
        batching, _ = self.batching(self.recipe, objective)
        rows, collate = self._rows, batching.collator(learning=False)
        batches = batching.held_out_batches(rows)
        know_constants(objective, model, rows, batches, collate)
        before = sums_beforehand(objective, model, rows, batches, collate)
        forward = objective.forward(model)
        of_base = forward.is_base

        def judge(row: TokenizedRow, losses: torch.Tensor) -> Sums:
            batch = with_sums(collate([row]), before)
            return objective.loss(forward.given(batch, losses, of_base), batch).sums()

        return judge

    def _one_by_one(self, model: nn.Module, objective: Objective) -> list[Sums]:
        """Losses of other tasks are sums over a batch, so that each row is one."""
        collate = self.batching(self.recipe, objective)[0].collator(learning=False)
        rows = self._rows
        each = [[i] for i in range(len(rows))]
        with task("evaluating rows", len(rows)):
            found = batch_losses(objective, model, rows, each, collate)
            return [loss.sums() for _, loss in found]

    def _put_together(self, found: list[list[Sums]], own: Objective | None) -> HeldOut:
        """Of the rows' sums by each of `_objectives(own)`."""
        objective = own or self.inputs.objective
        whole: Sums = {}
        for sums in found[-1]:
            whole = added(whole, sums)
        rows = iter(found[0])
        by_split = {name: [*islice(rows, len(part.rows))] for name, part in self.splits.items()}
        return HeldOut(by_split, objective.held_out(whole))


def load_base(recipe: Recipe, selection: float, seed: int) -> SweepBase:
    """Loads the base model of a sweep, and its rows.

    Args:
        selection: the share of the held-out prompts that choosing sees.
        seed: of the split of held-out rows, and of intervals.

    Raises:
        InputError: the model or the rows cannot be used, or too few are held out.
    """
    settle_in()
    if recipe.data.streaming:
        raise InputError("lorakit sweep reads all rows first: leave data.streaming out")
    inputs = _load(recipe)
    parts = split(inputs.data.eval, inputs.data.eval_samples, selection, seed)
    return SweepBase(recipe, inputs, parts, seed)


def _load(recipe: Recipe) -> TrainingInputs:
    device = wished_device(recipe)
    dtype = torch_dtype(recipe.dtype, device or best_device(), training=True)
    return load_inputs(recipe, dtype, device)


def split(
    rows: Sequence[TokenizedRow], samples: Sequence[AnySample], share: float, seed: int
) -> dict[str, Split]:
    """Held-out rows as `selection` (about `share` of the prompts) and `report`.

    Rows with the same prompt stay together: what is reported was not chosen by.
    """
    whole = whole_split(rows, samples)
    order = list(range(whole.prompts))
    random.Random(seed).shuffle(order)
    chosen = set(order[: round(share * len(order))])
    if min(len(chosen), len(order) - len(chosen)) < FEWEST:
        raise InputError(
            f"data.eval: {len(rows)} rows with {len(order)} prompts are too few to tell settings "
            f"apart: a sweep chooses by some of them and reports on the others, at least {FEWEST} "
            f"prompts each; hold out {2 * FEWEST} or more"
        )
    sides = {
        name: [i for i, unit in enumerate(whole.units) if (unit in chosen) == (name == SELECTION)]
        for name in (SELECTION, REPORT)
    }
    return {
        name: whole_split([rows[i] for i in own], [samples[i] for i in own])
        for name, own in sides.items()
    }


def whole_split(rows: Sequence[TokenizedRow], samples: Sequence[AnySample]) -> Split:
    """All of these rows as one split."""
    numbers: dict[str, int] = {}
    units = [numbers.setdefault(sample.prompt_key, len(numbers)) for sample in samples]
    return Split([*rows], [*samples], units)
