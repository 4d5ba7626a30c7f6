"""One source of rows or several to samples: with their own columns, and as often as they weigh.

A weight is how often an epoch sees a source's rows: with 2 each of them twice, with 0.5 half of
them, drawn once by the seed, so that the other half is never seen.
"""

import dataclasses
import hashlib
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.data.column_hints import unread_cure
from lorakit.data.formats import SUPERVISED, check_columns, recognise
from lorakit.data.other_objectives import refuse_other_objectives
from lorakit.data.pictures import digest, label
from lorakit.data.samples import Sample
from lorakit.data.sources import Contents, Row, read_source
from lorakit.data.splits import LEARNED, MEASURED
from lorakit.data.text_files import SampleBy, divided
from lorakit.errors import InputError, count, did_you_mean, each, listed

_LARGEST_WEIGHT = 1000
_SHOWN = 8  # names in a notice


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

    Of a folder it is the hash over the names and hashes of its files. `pictures_sha256` is the hash
    over those of the pictures of its rows, None where these have none.
    """

    path: str
    rows: int
    sha256: str
    weight: float = 1.0
    pictures_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types, without what there is not."""
        values = dataclasses.asdict(self)
        if self.pictures_sha256 is None:
            del values["pictures_sha256"]
        return values


@dataclass(frozen=True)
class Mixture:
    """The samples of all sources in their order, each once; `Sample.copies` says how often.

    `held_out` are the sources' own parts for validation, of those that have one.
    """

    samples: list[Sample]
    facts: list[DataFacts]
    notices: list[str]
    held_out: list[Source] = field(default_factory=list)

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
    wanted: Sequence[str] = LEARNED,
    kinds: Collection[str] = SUPERVISED,
    sample_by: SampleBy = "auto",
    as_learned: Callable[[Any], Any] = lambda sample: sample,
    read: Callable[[str, bool, Sequence[str]], Contents] = read_source,
    keeps_columns: bool = False,
) -> Mixture:
    """Reads one source or several.

    Args:
        columns: of sources that do not bring their own.
        limit: use only the first rows of each source.
        seed: draws the rows of a source whose weight is no whole number.
        key: the recipe's, for messages.
        wanted: which part of a data set in parts is read, as for `read_source`.
        kinds: of rows that the objective takes (`RowFormat.kind`).
        sample_by: what a document of a plain text file is, as in `data.text_files`.
        as_learned: makes of a row's sample what is learned of it; it may refuse the row.
        read: what reads a source, with the arguments of `read_source`.
        keeps_columns: samples keep the columns of their rows, so that none counts as unread.

    Raises:
        InputError: a source or the columns cannot be used, or rows; of many bad rows of a source
            the first is named and the others are counted.
    """
    parts = as_sources(sources)
    if not parts:
        raise InputError(f"{key} is an empty list; name at least one source")
    if limit is not None and limit < 1:
        raise InputError(f"data.limit is {limit}; give at least 1, or leave it out")
    check_columns(columns or {}, kinds)
    paths = [part.path for part in parts]
    if twice := [path for path, times in Counter(paths).items() if times > 1]:
        raise InputError(f"{key} names {twice[0]} twice; name it once, with weight: 2 if meant")
    names = [Path(path).name for path in paths]
    times = Counter(names)
    mixture = Mixture([], [], [])
    for part, name in zip(parts, names, strict=True):
        contents = read(part.path, times[name] > 1, wanted)
        rows, divisions = divided(contents.rows, sample_by)
        own = part.columns if part.columns is not None else columns
        samples, notices = _samples(part, rows[:limit], own or {}, kinds, as_learned, keeps_columns)
        used, drawn = _weighted(samples, part, seed)
        mixture.samples.extend(used)
        if contents.held_out:
            mixture.held_out.append(Source(contents.held_out, columns=part.columns))
        pictures = _hash_of_pictures(samples)
        fact = DataFacts(part.path, len(used), contents.sha256, part.weight, pictures)
        mixture.facts.append(fact)
        mixture.notices.extend(
            [*contents.notices, *(f"{part.path}: {x}" for x in divisions), *notices, *drawn]
        )
    return mixture


def _hash_of_pictures(samples: Sequence[Any]) -> str | None:
    """SHA-256 over the hashes of the samples' pictures, in order; None where there are none."""
    named = [
        (sample.where, source)
        for sample in samples
        if isinstance(sample, Sample)
        for source in sample.pictures
    ]
    if not named:
        return None
    whole = hashlib.sha256()
    for where, source in named:
        try:
            whole.update(digest(source).encode())
        except InputError as error:
            raise InputError(f"{where}: the picture {label(source)} {error}") from error
    return whole.hexdigest()


def as_sources(sources: Sources) -> list[Source]:
    """One source or several, as `Source`s."""
    given = [sources] if isinstance(sources, (str, Path)) else sources
    return [item if isinstance(item, Source) else Source(str(item)) for item in given]


def notice_of_own(held_out: Sequence[Source]) -> str:
    """What to say where a data set's own part for validation stands for a share."""
    own = listed((source.path for source in held_out), 3)
    return f"eval: {own} is held out, in place of the share in data.eval"


def load_samples(
    path: str | Path, columns: Mapping[str, str] | None = None, limit: int | None = None
) -> list[Sample]:
    """The samples to measure on in one source, at most the first `limit`.

    Of a data set in parts that is test, or else validation. Raises InputError as `mix` does.
    """
    return mix(path, columns, limit, wanted=MEASURED).samples


@dataclass
class _Rows:
    """How many rows have something, and where the first of them is."""

    first: str = ""
    rows: int = 0

    def add(self, row: Row) -> None:
        self.first = self.first or row.where
        self.rows += 1

    def __str__(self) -> str:
        return f"{count(self.rows, 'row')} (first: {self.first})"


def _samples(
    source: Source,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    kinds: Collection[str],
    as_learned: Callable[[Any], Any],
    keeps_columns: bool,
) -> tuple[list[Sample], list[str]]:
    """A source's samples, and what to say of their formats and of columns that no format reads."""
    formats, unread, found = (defaultdict[str, _Rows](_Rows) for _ in range(3))
    known: set[str] = set()

    def read(row: Row) -> Sample:
        refuse_other_objectives(row, columns, kinds)
        own = row.values
        form, row = recognise(row, columns, kinds)
        sample = as_learned(form.sample(row, asks="prompt" in kinds))
        if keeps_columns:
            sample = dataclasses.replace(sample, columns=own)
        formats[form.label].add(row)
        known.update(form.columns)
        for name, value in row.values.items():
            if keeps_columns or name in form.columns:
                continue
            if value is not None and value not in ("", [], {}):
                unread[name].add(row)
        if any(_has_crlf(row.values.get(name)) for name in form.columns):
            found["with \\r\\n line ends, read as \\n"].add(row)
        if sample.marked:
            found["with answers that are marked as not learned, and only read"].add(row)
        if sample.weights:
            found["with answers whose loss is scaled by a weight"].add(row)
        return sample

    samples = each(rows, read)
    notices = []
    if len(formats) > 1:
        kinds = ", ".join(f"{label} {p.rows:,} (first: {p.first})" for label, p in formats.items())
        notices.append(f"{source.path}: its rows are of several formats: {kinds}")
    notices += [f"{source.path}: {place} {what}" for what, place in found.items()]
    return samples, [*notices, *_unread_notices(source.path, unread, known)]


def _unread_notices(path: str, unread: Mapping[str, _Rows], known: set[str]) -> list[str]:
    """One notice with the names of all columns that no one reads, one for each that matters."""
    if not unread:
        return []
    names = list(unread)
    shown = [
        f"{name}{did_you_mean(name, known) if len(name) > 3 else ''}" for name in names[:_SHOWN]
    ]
    notices = [
        f"{path}: {count(len(names), 'column')} not read: "
        f"{listed([*shown, *names[_SHOWN:]], _SHOWN)}"
    ]
    for name in names:
        if cure := unread_cure(name, known):
            notices.append(f"{path}: '{name}' is not read, in {unread[name]}: {cure}")
    return notices


def _has_crlf(value: object) -> bool:
    if isinstance(value, str):
        return "\r\n" in value
    if isinstance(value, dict):
        return any(map(_has_crlf, value.values()))
    return isinstance(value, list) and any(map(_has_crlf, value))


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
