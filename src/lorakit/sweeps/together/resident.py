"""What all configurations share: one base model, and rows that are tokenised once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from lorakit.data.masking import TokenizedRow
from lorakit.errors import InputError
from lorakit.lora.model import LoraModel
from lorakit.lora.routing import BASE
from lorakit.lora.targets import resolve_targets
from lorakit.models.fingerprint import fingerprint
from lorakit.models.fused import fused
from lorakit.models.lines import Lines
from lorakit.models.loss import SupervisedLoss
from lorakit.objectives.objective import TrainingInputs
from lorakit.sweeps.together.alone import evaluates_itself
from lorakit.sweeps.together.evaluate import RowLosses, row_losses
from lorakit.training.batching import Batching, choose_batching
from lorakit.training.forecast import planned_steps
from lorakit.training.recipe import Recipe
from lorakit.training.schedule import check_schedule
from lorakit.training.setup import Setup, training_arguments
from lorakit.training.sharded import asks_to_spread


class Resident:
    """The base model and the rows, and what a configuration makes of them.

    Args:
        begun: the model and the rows of a causal language model.
        splits: held-out rows, by the names under which their losses are asked for.
    """

    def __init__(self, begun: TrainingInputs, splits: Mapping[str, Sequence[TokenizedRow]]) -> None:
        self.begun, self.splits = begun, splits
        self.model = begun.model
        self.device: torch.device = next(self.model.parameters()).device
        self.fingerprint = fingerprint(self.model, without=begun.new_modules)
        self.facts = [asdict(fact) for fact in begun.data.facts]
        pad = begun.tokenizer.pad_token_id
        self.pad_token_id: int = pad if isinstance(pad, int) else 0
        self._lines = Lines(self.model)
        self._base_losses: dict[str, RowLosses] = {}

    def batching(self, recipe: Recipe) -> tuple[Batching, list[str]]:
        """How rows become batches, with what to say where that is not as the recipe has it."""
        return choose_batching(recipe, self._lines, self.pad_token_id)

    def setup(self, recipe: Recipe, model: Any) -> Setup:
        """A run of `recipe` on `model`, ready to begin.

        Args:
            model: the base with an adapter of its own, or an adapter's share of one.

        Raises:
            InputError: it asks for several processes.
        """
        if asks_to_spread(recipe.training.model_extra or {}):
            raise InputError(
                "a sweep keeps its base in one process: leave out training.fsdp and deepspeed"
            )
        begun = self.begun
        batching, notices = self.batching(recipe)
        arguments = training_arguments(recipe, held_out=True)
        if not evaluates_itself(recipe, arguments):  # who trains it evaluates it
            arguments = training_arguments(recipe, held_out=False)
        if arguments.world_size > 1:
            raise InputError(
                "configurations train together in one process: start it without torchrun"
            )
        notices = [*notices, *check_schedule(arguments, self.steps(recipe, arguments))]
        return Setup(
            recipe=recipe,
            advice=[],
            begun=begun,
            model=model,
            tokenizer=begun.tokenizer,
            data=begun.data,
            arguments=arguments,
            batching=batching,
            compiled=False,
            base_fingerprint=self.fingerprint,
            notices=[*begun.data.notices, *notices],
        )

    def steps(self, recipe: Recipe, arguments: TrainingArguments) -> int:
        """The optimiser steps of a run of `recipe`."""
        batching, _ = self.batching(recipe)
        batches = batching.train_batches(self.begun.data.train, arguments, epoch=0)
        return planned_steps(arguments, len(batches))

    @contextmanager
    def adapted(self, recipes: Mapping[str, Recipe]) -> Iterator[LoraModel]:
        """The base with an adapter for each recipe, by name, started as in a run of its own.

        Behind the block the base is as it was.

        Raises:
            InputError: an adapter does not fit the base.
        """
        model: LoraModel | None = None
        try:
            for name, recipe in recipes.items():
                set_seed(recipe.training.seed)
                config = self.begun.lora_config(recipe)
                if model is None:
                    model = LoraModel(self.model, config, name)
                else:
                    model.add_adapter(name, config)
            assert model is not None
            model.set_adapter(list(recipes))
            with fused(model):
                yield model
        finally:
            if model is not None:
                if getattr(self.model, "is_activation_checkpointing", False):
                    self.model.activation_checkpointing_disable()
                model.unload()

    def factor_parameters(self, recipe: Recipe) -> int:
        """How many parameters the factors of a configuration have that can share batches."""
        config = self.begun.lora_config(recipe)
        count = 0
        for path in resolve_targets(self.model, config):
            module: Any = self.model.get_submodule(path)
            linear = hasattr(module, "in_features")
            widths = (module.in_features, module.out_features) if linear else module.weight.shape
            count += config.rank_for(path) * sum(widths)
        return count

    def losses(
        self, model: LoraModel, loss: SupervisedLoss, names: Sequence[str], recipe: Recipe
    ) -> list[dict[str, RowLosses]]:
        """By split, the losses of its rows with each of these adapters.

        Args:
            recipe: says how rows become batches.
        """
        batching, _ = self.batching(recipe)
        found: list[dict[str, RowLosses]] = [{} for _ in names]
        for split, rows in self.splits.items():
            by_name = row_losses(model, loss, names, rows, batching, self.pad_token_id)
            for own, losses in zip(found, by_name, strict=True):
                own[split] = losses
        return found

    def base_losses(
        self, model: LoraModel, loss: SupervisedLoss, recipe: Recipe
    ) -> dict[str, RowLosses]:
        """Those of the bare base, taken once."""
        if not self._base_losses:
            [self._base_losses] = self.losses(model, loss, [BASE], recipe)
        return self._base_losses
