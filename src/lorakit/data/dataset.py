"""A recipe's data section to rows ready for training: read, check, split, tokenize, count.

What the user should know but need not act on comes back: what was chosen (a template, the eval
share) as `notices`, what was found in the rows as `findings`; printing is left to the caller.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lorakit.data.checks import AnySample, Finding, RowStatistics, findings, statistics
from lorakit.data.formats import Sample, check_columns, to_sample
from lorakit.data.masking import TokenizedRow, encode, label, read
from lorakit.data.sources import file_sha256, read_rows
from lorakit.data.templates import ensure_template
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class DataFacts:
    """A file that was read: how many of its rows are used, and the hash of all its bytes."""

    path: str
    rows: int
    sha256: str


@dataclass(frozen=True)
class PreparedData:
    """Rows for training and evaluation; `train[i]` is the tokenized `train_samples[i]`."""

    train: Sequence[TokenizedRow]
    eval: Sequence[TokenizedRow]
    train_samples: Sequence[AnySample]
    eval_samples: Sequence[AnySample]
    facts: list[DataFacts]
    notices: list[str]
    findings: list[Finding]

    def statistics(self) -> dict[str, RowStatistics]:
        """The numbers of both parts, of those that have rows."""
        parts = {
            "train": statistics(self.train_samples, self.train),
            "eval": statistics(self.eval_samples, self.eval),
        }
        return {name: part for name, part in parts.items() if part.rows}


def load_samples(
    path: str | Path, columns: Mapping[str, str] | None = None, limit: int | None = None
) -> list[Sample]:
    """The samples of a file, at most the first `limit`, through the mapping `columns`.

    Raises:
        InputError: the file or `columns` cannot be used, or rows of it; of many bad rows the
            first is named and the others are counted.
    """
    check_columns(columns or {})
    if limit is not None and limit < 1:
        raise InputError(f"data.limit is {limit}; give a number of rows from 1, or leave it out")
    return _each(read_rows(path)[:limit], lambda row: to_sample(row, columns))


def prepare(
    tokenizer: "PreTrainedTokenizerBase",
    train: str | Path,
    eval: float | str | Path = 0.1,
    *,
    max_length: int = 1024,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    seed: int = 42,
    to_row: Callable[[Sample, "PreTrainedTokenizerBase", int], TokenizedRow] | None = None,
) -> PreparedData:
    """Read, split and tokenize the data of a recipe.

    Args:
        tokenizer: a fast tokenizer; a plain chat template is set on it if it needs one.
        train: path of the training file.
        eval: the share of the training rows to hold out, `0 <= eval < 1`, or the path of a file.
            Rows with the same prompt are held out together, so that no prompt is seen in both.
        max_length: tokens; longer rows are cut from the right, and counted in a notice.
        columns: maps a format's column names to the files' own.
        limit: use only the first rows of each file, for a quick trial.
        seed: of the split.
        to_row: makes a row of a sample, with at most `max_length` tokens; None for rows that a
            causal model learns.

    Raises:
        InputError: anything in the files or these values that cannot be used.
    """
    if max_length < 2:
        raise InputError(f"data.max_length is {max_length}; a row needs at least 2 tokens")
    samples = load_samples(train, columns, limit)
    facts = [DataFacts(str(train), len(samples), file_sha256(train))]
    if isinstance(eval, (int, float)):
        kept, held, notices = _split(samples, eval, seed, str(train))
    else:
        kept, held = samples, load_samples(eval, columns, limit)
        facts.append(DataFacts(str(eval), len(held), file_sha256(eval)))
        notices = []
    everything = kept + held
    if to_row is None:
        has_messages = any(sample.messages for sample in everything)
        if has_messages and (notice := ensure_template(tokenizer)):
            notices.append(notice)
        readings = _each(everything, lambda sample: read(sample, tokenizer))
        rows = _each(
            zip(readings, encode(readings, tokenizer), strict=True),
            lambda pair: label(*pair, tokenizer, max_length),
        )
    else:
        make = to_row
        rows = _each(everything, lambda sample: make(sample, tokenizer, max_length))
    train_rows, eval_rows = rows[: len(kept)], rows[len(kept) :]
    found = findings(
        list(zip(kept, train_rows, strict=True)),
        list(zip(held, eval_rows, strict=True)),
        tokenizer,
        max_length,
    )
    return PreparedData(train_rows, eval_rows, kept, held, facts, notices, found)


def _each(items: Iterable[In], make: Callable[[In], Out]) -> list[Out]:
    """`make` of every item; the first failure is raised, with the number of the others."""
    made, failures = [], []
    for item in items:
        try:
            made.append(make(item))
        except InputError as error:
            failures.append(error)
    if not failures:
        return made
    if len(failures) == 1:
        raise failures[0]
    others = len(failures) - 1
    raise InputError(f"{failures[0]} (and {_count(others, 'more row')})") from failures[0]


def _split(
    samples: list[Sample], share: float, seed: int, path: str
) -> tuple[list[Sample], list[Sample], list[str]]:
    """Training samples, held-out samples, and a notice about the share."""
    if isinstance(share, bool) or not 0 <= share < 1:
        raise InputError(f"data.eval is {share}; give a share from 0 to below 1, or a path")
    if share == 0:
        return samples, [], []
    keys = [sample.prompt_key for sample in samples]
    sizes: dict[str, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    if len(sizes) < 2:
        raise InputError(
            f"data.eval: {path} has {_count(len(samples), 'row')} with one prompt, so no share of "
            "it can be held out without leaking; add rows, give a file, or set data.eval to 0"
        )
    wanted = min(max(1, round(share * len(samples))), len(samples) - 1)
    order = list(sizes)
    random.Random(seed).shuffle(order)
    chosen: set[str] = set()
    size = 0
    for key in order:
        # Never above the share: one prompt with many rows must not empty the training side.
        if size + sizes[key] <= wanted:
            chosen.add(key)
            size += sizes[key]
    if not chosen:
        chosen = {min(order, key=sizes.__getitem__)}
    kept = [sample for sample, key in zip(samples, keys, strict=True) if key not in chosen]
    held = [sample for sample, key in zip(samples, keys, strict=True) if key in chosen]
    notice = (
        f"eval: {len(held)} of {_count(len(samples), 'row')} held out "
        f"({_count(len(chosen), 'prompt')} that training does not see, seed {seed})"
    )
    return kept, held, [notice]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
