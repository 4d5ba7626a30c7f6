"""What `lorakit check` finds out about a run that is not made: rows, parameters, time, memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lorakit.data.checks import RowStatistics
from lorakit.data.label_rows import LabelledRow
from lorakit.data.masking import IGNORE, TokenizedRow
from lorakit.data.picture_figures import PictureFigures, picture_figures
from lorakit.lora.status import ModuleKind, parameter_table
from lorakit.training.forecast import Forecast, forecast
from lorakit.training.recipe import Recipe
from lorakit.training.setup import Setup, set_up

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BEHIND = 8  # tokens before one that are decoded with it
_ENDLESS = 2**30  # tokens: a row is shown whole


@dataclass(frozen=True)
class ShownPiece:
    """A stretch of a row's text: `learned`, `read` or `cut`."""

    text: str
    state: str


@dataclass(frozen=True)
class Check:
    """A run that could begin, in numbers; `forecast` is None where none was wanted.

    Attributes:
        pictures: of the parts of the data that have some.
    """

    setup: Setup
    statistics: dict[str, RowStatistics]
    pictures: dict[str, PictureFigures]
    modules: list[ModuleKind]
    forecast: Forecast | None


def check(recipe: Recipe, *, with_forecast: bool = True) -> Check:
    """Does all that `train` would do before the first step, and writes nothing.

    Raises:
        InputError: the recipe, the model or the rows cannot be used.
        LorakitError: the largest batch does not fit into the GPU's memory.
    """
    setup = set_up(recipe)
    expected = None
    if with_forecast:
        with TemporaryDirectory() as elsewhere, setup.fast():
            setup.arguments.output_dir = elsewhere  # Trainer makes its folder at once
            expected = forecast(setup.trainer())
    modules = parameter_table(setup.model, setup.model.active_adapter)
    parts = {"train": setup.data.train, "eval": setup.data.eval}
    figures = {name: picture_figures(rows) for name, rows in parts.items()}
    pictures = {name: found for name, found in figures.items() if found is not None}
    return Check(setup, setup.data.statistics(), pictures, modules, expected)


def shown_row(setup: Setup, index: int) -> list[ShownPiece]:
    """Row `index` to learn from, token by token: what is learned, only read, or cut."""
    row, sample = setup.data.train[index], setup.data.train_samples[index]
    if isinstance(row, LabelledRow):  # what is learned stands behind what is read
        text = setup.tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False)
        return [ShownPiece(f"{text} → ", "read"), ShownPiece(sample.reference, "learned")]
    whole = row
    if row.truncated:
        whole = setup.inputs.objective.tokenize(sample, setup.tokenizer, _ENDLESS)
    return pieces(whole, len(row), setup.tokenizer)


def pieces(whole: TokenizedRow, kept: int, tokenizer: PreTrainedTokenizerBase) -> list[ShownPiece]:
    """The tokens of a row as text; tokens that share a character stay together.

    Args:
        whole: the row before cutting.
        kept: how many of its tokens are kept.
    """
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    found: list[ShownPiece] = []
    waiting: list[int] = []
    for at, (token, label) in enumerate(zip(whole.input_ids, whole.labels, strict=True)):
        waiting.append(token)
        # Behind tokens before it: alone, a token may lose the space that it begins with.
        before = whole.input_ids[max(0, at + 1 - len(waiting) - _BEHIND) : at + 1 - len(waiting)]
        text = decode([*before, *waiting])[len(decode(before)) :]
        if "\ufffd" in text and len(waiting) < 8:  # half of a character: the rest follows
            continue
        state = "cut" if at >= kept else "read" if label == IGNORE else "learned"
        found.append(ShownPiece(text, state))
        waiting = []
    return found
