"""One source of rows or several to samples: with their own columns, and as often as they weigh.

A weight is how often an epoch sees a source's rows: with 2 each of them twice, with 0.5 half of
them, drawn once by the seed, so that the other half is never seen.
"""

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorakit.data.formats import Sample, check_columns, recognise
from lorakit.data.sources import Contents, Row, read_source
from lorakit.errors import InputError, did_you_mean, listed

In = TypeVar("In")
Out = TypeVar("Out")

_LARGEST_WEIGHT = 1000


@dataclass(frozen=True)
class Source:
    """Rows to learn from: where they are, how often an epoch sees them, and their columns' names.

    `path` is whatever `read_source` reads. Without `columns`, those of the whole recipe apply.
    """

    path: str
    weight: float = 1.0
    columns: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and 0 < self.weight <= _LARGEST_WEIGHT):
            raise InputError(
                f"the weight of {self.path} is {self.weight}; give a number above 0 (how often "
                f"an epoch sees each row) up to {_LARGEST_WEIGHT}, or leave the source out"
            )


Sources = str | Path | Sequence[str | Path | Source]
"""One source, or several."""


@dataclass(frozen=True)
class DataFacts:
    """A source that was read: how many of its rows are used, how often, and a hash of its bytes.

    Of a folder it is the hash over the names and hashes of its files.
    """

    path: str
    rows: int
    sha256: str
    weight: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """The samples of all sources in their order, each once; `Sample.copies` says how often."""

    samples: list[Sample]
    facts: list[DataFacts]
    notices: list[str]

    @property
    def name(self) -> str:
        """The paths of all sources, for messages."""
        return listed((fact.path for fact in self.facts), 3)


def mix(
    sources: Sources,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    *,
    seed: int = 42,
    key: str = "data.train",
) -> Mixture:
    """Reads one source or several.

    Args:
        columns: of sources that do not bring their own.
        limit: use only the first rows of each source.
        seed: draws the rows of a source whose weight is no whole number.
        key: the recipe's, for messages.

    Raises:
        InputError: a source or the columns cannot be used, or rows; of many bad rows of a source
            the first is named and the others are counted.
    """
    given = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not given:
        raise InputError(f"{key} is an empty list; name at least one source")
    if limit is not None and limit < 1:
        raise InputError(f"data.limit is {limit}; give a number of rows from 1, or leave it out")
    check_columns(columns or {})
    parts = [item if isinstance(item, Source) else Source(str(item)) for item in given]
    paths = [part.path for part in parts]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise InputError(f"{key} names {twice[0]} twice; name it once, with weight: 2 if meant")
    names = [Path(path).name for path in paths]
    mixture = Mixture([], [], [])
    for part, name in zip(parts, names, strict=True):
        contents = read_source(part.path, full_names=names.count(name) > 1)
        own = part.columns if part.columns is not None else columns
        samples, notices = _samples(part, contents, own or {}, limit)
        used, drawn = _weighted(samples, part, seed)
        mixture.samples.extend(used)
        mixture.facts.append(DataFacts(part.path, len(used), contents.sha256, part.weight))
        mixture.notices.extend([*contents.notices, *notices, *drawn])
    return mixture


def load_samples(
    path: str | Path, columns: Mapping[str, str] | None = None, limit: int | None = None
) -> list[Sample]:
    """The samples of one source, at most the first `limit`; raises InputError as `mix` does."""
    return mix(path, columns, limit).samples


def each(items: Iterable[In], make: Callable[[In], Out]) -> list[Out]:
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
    raise InputError(f"{failures[0]} (and {count(others, 'more row')})") from failures[0]


def count(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _samples(
    source: Source, contents: Contents, columns: Mapping[str, str], limit: int | None
) -> tuple[list[Sample], list[str]]:
    """A source's samples, and what to say of their formats and of columns that no format reads."""
    formats: Counter[str] = Counter()
    first_of: dict[str, str] = {}
    unread: dict[str, str] = {}  # and what may be meant

    def read(row: Row) -> Sample:
        form, row = recognise(row, columns)
        sample = form.sample(row)
        formats[form.label] += 1
        first_of.setdefault(form.label, row.where)
        for name, value in row.values.items():
            if name not in form.columns and value is not None and name not in unread:
                unread[name] = did_you_mean(name, form.columns) if len(name) > 3 else ""
        return sample

    samples = each(contents.rows[:limit], read)
    notices = []
    if len(formats) > 1:
        kinds = ", ".join(
            f"{label} {n:,} (first: {first_of[label]})" for label, n in formats.items()
        )
        notices.append(f"{source.path}: its rows are of several formats: {kinds}")
    if unread:
        named = [f"{name}{meant}" for name, meant in unread.items()]
        notices.append(
            f"{source.path}: {count(len(unread), 'column')} that no one reads: {listed(named, 8)}"
        )
    return samples, notices


def _weighted(samples: list[Sample], source: Source, seed: int) -> tuple[list[Sample], list[str]]:
    """The samples that the weight leaves, with their copies, and a notice about it."""
    if source.weight == 1:
        return samples, []
    part, whole = math.modf(source.weight)
    drawn = set(
        random.Random(f"{seed}/{source.path}").sample(
            range(len(samples)), round(part * len(samples))
        )
    )
    copies = [int(whole) + (i in drawn) for i in range(len(samples))]
    used = [
        dataclasses.replace(sample, copies=n)
        for sample, n in zip(samples, copies, strict=True)
        if n
    ]
    if not used:
        raise InputError(
            f"the weight of {source.path} is {source.weight:g}, which leaves none of its "
            f"{count(len(samples), 'row')}; raise it or leave the source out"
        )
    by_seed = f", drawn by seed {seed}" if drawn else ""
    return used, [
        f"{source.path}: weight {source.weight:g}: {len(used):,} of {count(len(samples), 'row')}"
        f"{by_seed}; an epoch sees {sum(copies):,}, less what is held out"
    ]
