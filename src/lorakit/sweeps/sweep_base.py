"""What a sweep's configurations share: one base model, rows tokenised once, held-out splits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from lorakit.adapters.open import with_frozen
from lorakit.bootstrap import Interval, loss_interval
from lorakit.engine.resident import ResidentModel
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.lora.parameters import count_parameters
from lorakit.models.fused import fused
from lorakit.models.lines import Lines
from lorakit.models.load import best_device, torch_dtype
from lorakit.objectives.objective import Objective, TrainingInputs
from lorakit.sweeps.held_out_rows import HeldOut, HeldOutRows, SplitLosses, TokenLosses
from lorakit.sweeps.space.configurations import changed
from lorakit.sweeps.splits import Split, split
from lorakit.training.adapter_settings import adapter_config
from lorakit.training.advice import advised
from lorakit.training.batching import Batching, choose_batching
from lorakit.training.machine import settle_in
from lorakit.training.position import planned_steps
from lorakit.training.recipe import Recipe
from lorakit.training.setup import load_inputs, wished_device
from lorakit.training.stages import load_beside


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
        if settings == inputs.objective.settings and not inputs.objective.on_policy:
            return inputs  # what is sampled for a run is kept in its own objective
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
                resident.create(name, adapter_config(recipe, self.inputs), recipe.training.seed)
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
            model = LoraModel(inputs.model, adapter_config(recipe, inputs), low_cpu_mem_usage=True)
            try:
                self._trained[key] = model.get_nb_trainable_parameters()[0]
            finally:
                model.unload()
        return self._trained[key]

    # --- held-out rows ----------------------------------------------------------------------

    @cached_property
    def held_out(self) -> HeldOutRows:
        """The held-out rows, under any adapter."""
        objective = self.inputs.objective
        return HeldOutRows(
            self.splits,
            objective,
            lambda own: self.batching(self.recipe, own)[0],
            self.shares_passes,
            self.inputs.tokenizer,
        )

    @cached_property
    def bare(self) -> HeldOut:
        """What the held-out rows give without an adapter."""
        with self._without_adapter() as model:
            return self.held_out.of(model)

    @property
    def bare_losses(self) -> SplitLosses:
        """The losses of the held-out rows without an adapter."""
        return self.bare.losses

    def bare_scores(self, own: Objective) -> dict[str, float]:
        """Loss and scores of all held-out rows without an adapter, by these settings."""
        if self.held_out.is_common(own):
            return self.bare.scores
        if not self.held_out.by_tokens(own):
            with self._without_adapter() as model:
                return self.held_out.of(model, own).scores
        return self.held_out.scores(self.inputs.model, own, self._bare_tokens)

    @cached_property
    def _bare_tokens(self) -> TokenLosses:
        return self.held_out.tokens(self.inputs.model)

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
