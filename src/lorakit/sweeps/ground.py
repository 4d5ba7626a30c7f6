"""What all configurations of a sweep share: the base model, the rows, and the held-out splits.

The data is read and tokenised once, and the base is held once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lorakit.data.checks import AnySample
from lorakit.data.masking import TokenizedRow
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.lora.parameters import count_parameters
from lorakit.models.fingerprint import fingerprint
from lorakit.models.lines import Lines
from lorakit.models.load import best_device, torch_dtype
from lorakit.objectives.objective import TrainingInputs
from lorakit.sweeps.row_losses import SplitLosses, losses_of
from lorakit.sweeps.space.configurations import changed
from lorakit.training.advice import advised
from lorakit.training.batching import choose_batching
from lorakit.training.machine import settle_in
from lorakit.training.recipe import Recipe
from lorakit.training.setup import load_inputs, wished_device

SELECTION, REPORT = "selection", "report"

FEWEST = 8
"""Held-out prompts of a split: of fewer, a bootstrap says nothing."""


@dataclass(frozen=True)
class Split:
    """Held-out rows with their samples; `units[i]` numbers the prompt of row i."""

    rows: list[TokenizedRow]
    samples: list[AnySample]
    units: list[int]


class Ground:
    """A base model and its rows, for one configuration after the other.

    Args:
        recipe: of the sweep, without its changes.
        selection: the share of the held-out prompts that choosing sees.
        seed: of the split of held-out rows.

    Attributes:
        begun: model, tokenizer, rows, loss and batches, as the task has them.
        splits: by name, `selection` and `report`.
        base_fingerprint: of the base model's weights.
        parameters: of the base model.
        notices: lines for the user.

    Raises:
        InputError: the model or the rows cannot be used, or too few are held out.
    """

    def __init__(self, recipe: Recipe, selection: float, seed: int) -> None:
        settle_in()
        self.recipe = recipe
        self.begun = self._begin(recipe)
        self.base_fingerprint = fingerprint(self.begun.model, without=self.begun.new_modules)
        self._seed = recipe.training.seed  # a new head's values are drawn with it
        pad = self.begun.tokenizer.pad_token_id
        self._batching, _ = choose_batching(
            recipe,
            Lines(self.begun.model),
            pad if isinstance(pad, int) else 0,
            self.begun.collator,
        )
        self.parameters = count_parameters(self.begun.model)[1]
        data = self.begun.data
        self.splits = split(data.eval, data.eval_samples, selection, seed)
        self.notices = [*data.notices, *(f.line for f in data.findings if f.count)]

    @property
    def held_out(self) -> Mapping[str, Sequence[TokenizedRow]]:
        """The rows of each split."""
        return {name: part.rows for name, part in self.splits.items()}

    def complete(self, recipe: Recipe) -> Recipe:
        """`recipe` with what it leaves open filled in, and the rows of the sweep held out."""
        full, _ = advised(recipe, self.parameters, len(self.begun.data.train))
        if full.data_seed != self.recipe.data_seed:
            full = full.filled_in({"data.seed": self.recipe.data_seed})
        return full

    def beginning(self, recipe: Recipe) -> TrainingInputs:
        """What a configuration begins with: these rows, and the base.

        A base with a new head is loaded again for another seed, which draws the head's values.
        """
        if self.begun.new_modules and recipe.training.seed != self._seed:
            fresh = self._begin(changed(self.recipe, {"training.seed": recipe.training.seed}))
            self.begun = replace(self.begun, model=fresh.model)
            self._seed = recipe.training.seed
        return self.begun

    @contextmanager
    def with_adapter(self, folder: Path, recipe: Recipe) -> Iterator[LoraModel]:
        """The base with the adapter in `folder`, to evaluate; bare again behind the block."""
        model = LoraModel.from_pretrained(self.beginning(recipe).model, folder).eval()
        try:
            yield model
        finally:
            model.unload()

    def losses(self, model: nn.Module) -> SplitLosses:
        """Those of the held-out rows, with the adapters that are active in `model`."""
        return losses_of(model, self.begun, self.held_out, self._batching)

    def trained_parameters(self, recipe: Recipe) -> int:
        """How many parameters a configuration trains; they are counted without being made.

        Raises:
            InputError: its targets match nothing in the model.
        """
        begun = self.beginning(recipe)
        model = LoraModel(begun.model, begun.lora_config(recipe), low_cpu_mem_usage=True)
        try:
            return model.get_nb_trainable_parameters()[0]
        finally:
            model.unload()

    def _begin(self, recipe: Recipe) -> TrainingInputs:
        device = wished_device(recipe)
        dtype = torch_dtype(recipe.dtype, device or best_device(), training=True)
        return load_inputs(recipe, dtype, device)


def split(
    rows: Sequence[TokenizedRow], samples: Sequence[AnySample], share: float, seed: int
) -> dict[str, Split]:
    """Held-out rows as `selection` (about `share` of the prompts) and `report`.

    Rows with the same prompt stay together: what is reported was not chosen by.

    Raises:
        InputError: there are too few prompts to choose by some and report on others.
    """
    numbers: dict[str, int] = {}
    units = [numbers.setdefault(sample.prompt_key, len(numbers)) for sample in samples]
    order = list(range(len(numbers)))
    random.Random(seed).shuffle(order)
    chosen = set(order[: round(share * len(order))])
    if min(len(chosen), len(order) - len(chosen)) < FEWEST:
        raise InputError(
            f"data.eval: {len(rows)} rows with {len(order)} prompts are too few to tell settings "
            f"apart: a sweep chooses by some of them and reports on the others, at least {FEWEST} "
            f"prompts each; hold out {2 * FEWEST} or more"
        )
    return {
        name: _part(rows, samples, units, [i for i, u in enumerate(units) if (u in chosen) == mine])
        for name, mine in ((SELECTION, True), (REPORT, False))
    }


def _part(
    rows: Sequence[TokenizedRow],
    samples: Sequence[AnySample],
    units: Sequence[int],
    which: Sequence[int],
) -> Split:
    numbers: dict[int, int] = {}
    return Split(
        [rows[i] for i in which],
        [samples[i] for i in which],
        [numbers.setdefault(units[i], len(numbers)) for i in which],
    )
