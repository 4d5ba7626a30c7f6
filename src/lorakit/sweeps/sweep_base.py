"""What a sweep's configurations share: one base model, rows tokenised once, held-out splits."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
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
from lorakit.evaluation.held_out import RowLosses, batch_losses, row_losses
from lorakit.lora import LoraModel
from lorakit.lora.parameters import count_parameters
from lorakit.models.fused import fused
from lorakit.models.lines import Lines
from lorakit.models.load import best_device, torch_dtype
from lorakit.models.loss import SupervisedLoss
from lorakit.objectives.objective import TrainingInputs
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
        self.facts = [asdict(fact) for fact in inputs.data.facts]
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
        plain = inputs.objective.shares_passes(inputs.data.train)
        return plain and not (inputs.start or inputs.own_tokenizer)

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

    def batching(self, recipe: Recipe) -> tuple[Batching, list[str]]:
        """How rows become batches, with a notice where that is not as the recipe has it."""
        inputs = self.inputs
        batching, notices = choose_batching(recipe, self._lines, self.pad_token_id, inputs.collator)
        return replace(batching, to_batch=inputs.objective.to_batch), notices

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
    def bare_losses(self) -> SplitLosses:
        """The losses of the held-out rows without an adapter."""
        if self.inputs.teacher is None:
            return self.losses(self.inputs.model)
        model = LoraModel(self.inputs.model, None)
        load_beside(model, self.inputs.objective, None)
        try:
            return self.losses(model)
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
        if not self.shares_passes:
            return {name: self._one_by_one(model, part.rows) for name, part in self.splits.items()}
        loss = SupervisedLoss(model)
        [found] = self._in_batches(model, lambda batch: [loss.of_tokens(model, batch)], 1)
        return found

    def losses_of_each(
        self, resident: ResidentModel, names: Sequence[str]
    ) -> dict[str, SplitLosses]:
        """The losses of the held-out rows with each of these adapters.

        As many of them share a pass as fit into `AT_ONCE` tokens.
        """

        def token_losses(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            several = max(1, AT_ONCE // batch["input_ids"].numel())
            return [
                losses
                for at in range(0, len(names), several)
                for losses in resident.token_losses(
                    [AdapterBatch(name, batch) for name in names[at : at + several]]
                )
            ]

        found = self._in_batches(resident.model, token_losses, len(names))
        return dict(zip(names, found, strict=True))

    def _in_batches(self, model: nn.Module, token_losses: Any, several: int) -> list[SplitLosses]:
        batching, _ = self.batching(self.recipe)
        collate = batching.collator(learning=False)
        found: list[SplitLosses] = [{} for _ in range(several)]
        for split, part in self.splits.items():
            batches = batching.held_out_batches(part.rows)
            by_name = row_losses(model, part.rows, batches, collate, token_losses, several)
            for own, losses in zip(found, by_name, strict=True):
                own[split] = losses
        return found

    def _one_by_one(self, model: nn.Module, rows: Sequence[TokenizedRow]) -> RowLosses:
        """Losses of other tasks are sums over a batch, so that each row is one."""
        collate = self.batching(self.recipe)[0].collator(learning=False)
        each = [[i] for i in range(len(rows))]
        with task("evaluating rows", len(rows)):
            return [
                (float(loss.total), int(loss.count))
                for _, loss in batch_losses(self.inputs.objective, model, rows, each, collate)
            ]


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
