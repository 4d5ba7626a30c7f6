"""What tokenized rows look like in numbers, and what a user should know of some of them.

Nothing here changes a row or refuses one: rows that cannot be used are errors where they are
read. These are the ones that can be used and may not be meant.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data.findings import AnySample, Finding, finding
from lorakit.data.label_rows import LabelledRow
from lorakit.data.masking import IGNORE, TokenizedRow, sequences_of
from lorakit.data.preference_checks import PreferenceFigures
from lorakit.data.samples import Sample
from lorakit.data.too_long import Limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BINS = 12
_PARTS = {
    "tools": "its tools",
    "assistant": "all of an answer (its reasoning, or what is said beside a tool call)",
    "system": "the system message",
    "tool": "what tools answered",
    "user": "a user message whole",
    "prompt": "what precedes the last answer in chat (such as '<think>')",
}  # what a template may leave out (`TokenizedRow.unshown`)
_PERCENTILES = {"p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95}


@dataclass(frozen=True)
class RowStatistics:
    """Rows in numbers; lengths are in tokens, after cutting.

    Attributes:
        lengths: `min`, `p5`, `p25`, `p50`, `p75`, `p95`, `max`.
        histogram: [from, below, rows] of each bin, all of the same width.
        preferences: of pairs and judged answers (`preference_checks`).
    """

    rows: int
    tokens: int
    supervised: int
    truncated: int
    duplicates: int
    empty_answers: int
    lengths: dict[str, int]
    histogram: list[list[int]]
    preferences: PreferenceFigures | None = None

    @property
    def supervised_share(self) -> float:
        """Tokens that are learned, of all."""
        return self.supervised / self.tokens if self.tokens else 0.0


def statistics(samples: Sequence[AnySample], rows: Sequence[TokenizedRow]) -> RowStatistics:
    """The numbers of `rows`; `rows[i]` is the tokenized `samples[i]`.

    Lengths are those of sequences: of a pair both, each with the prompt.
    """
    lengths = sorted(len(sequence) for sequence in sequences_of(rows))
    return RowStatistics(
        rows=len(rows),
        tokens=sum(lengths),
        supervised=sum(row.supervised for row in rows),
        truncated=sum(row.truncated for row in rows),
        duplicates=len(_repeated(samples)),
        empty_answers=len(_without_answer(zip(samples, rows, strict=True))),
        lengths=_percentiles(lengths),
        histogram=_histogram(lengths),
    )


def findings(
    train: Sequence[tuple[AnySample, TokenizedRow]],
    held_out: Sequence[tuple[AnySample, TokenizedRow]],
    tokenizer: PreTrainedTokenizerBase,
    limit: Limit,
    left_out: Sequence[TokenizedRow] = (),
) -> list[Finding]:
    """Everything that is looked for, each with its count, which may be 0.

    Args:
        limit: how many tokens of a row are read.
        left_out: the rows that are too long to be used at all.
    """
    everything = [*train, *held_out]
    rows = [row for _, row in everything]
    samples = [sample for sample, _ in train]
    cut = [row for row in rows if row.truncated]
    seen = {_key(sample) for sample, _ in held_out}
    bos, special = tokenizer.bos_token_id, tokenizer.all_special_ids
    found = [
        finding(
            f"longer than {limit} and cut at the end",
            cut,
            len(everything),
            _too_long(cut, everything, left_out, limit),
        ),
        finding(
            "the same as an earlier row to learn from",
            _repeated(samples),
            len(train),
            "repeated rows are learned more strongly: drop them unless that is meant",
        ),
        finding(
            "both learned from and held out",
            [sample for sample in samples if _key(sample) in seen],
            len(train),
            "held-out numbers will be too good: remove them from one of the two",
        ),
        finding(
            "without an answer's text",
            _without_answer(everything),
            len(everything),
            "they teach the model to say nothing: fill or drop them",
        ),
        finding(
            "begun with two BOS tokens",
            [row for row in rows if _two_bos(row, bos)],
            len(everything),
            "the text brings one and the template another: take it out of the text",
        ),
        finding(
            "left without an end token after an answer",
            [row for sample, row in everything if sample.messages and _endless(row, special)],
            len(everything),
            "the model would not learn to stop: the chat template should close an answer",
        ),
    ]
    if apart := [row for row in rows if row.apart]:
        what = "tokenised in parts, as one text would have joined a prompt and its answer"
        cure = (
            "nothing is lost, the answer is learned after the tokens of its generation "
            "prompt; blanks at an answer's beginning are learned too: strip them unless meant"
        )
        found.append(finding(what, apart, len(everything), cure))
    if left_out:
        what = f"left out, as {limit} ends before the row or its answer"
        cure = _too_long(left_out, everything, left_out, limit)
        found.append(finding(what, left_out, len(everything) + len(left_out), cure))
    for part in dict.fromkeys(part for row in rows for part in row.unshown):
        hidden = [row for row in rows if part in row.unshown]
        what = f"learned without {_PARTS[part]}, which the chat template does not show"
        cure = "use a model whose template has a place for it"
        found.append(finding(what, hidden, len(everything), cure))
    return found


def _too_long(
    rows: Sequence[TokenizedRow],
    kept: Sequence[tuple[AnySample, TokenizedRow]],
    left_out: Sequence[TokenizedRow],
    limit: Limit,
) -> str:
    """What is lost by rows that are too long, and what keeps it."""
    if not rows:
        return ""
    longest = max(row.longest for row in rows)
    lost = sum(row.cut for _, row in kept) + sum(len(row) + row.cut for row in left_out)
    whole = lost + sum(len(row) for _, row in kept)
    share = f"{lost / whole:.0%}" if lost >= 0.005 * whole else "under 1%"
    cure = limit.cure(longest)
    if any(
        sample.text is not None for sample, row in kept if isinstance(sample, Sample) and row.cut
    ):
        cure = f"data.too_long=split learns all of plain text, in rows of that length; else {cure}"
    return f"{share} of all tokens are lost; the longest has {longest:,} tokens: {cure}"


def _key(sample: AnySample) -> tuple[str, ...]:
    if isinstance(sample, Sample):
        return sample.content_key
    return sample.prompt_key, sample.reference


def _repeated(samples: Sequence[AnySample]) -> list[AnySample]:
    """All but the first of those that are the same; copies that a weight made are one row."""
    first: dict[tuple[str, ...], str] = {}
    return [s for s in samples if first.setdefault(_key(s), s.where) != s.where]


def _without_answer(pairs: Iterable[tuple[AnySample, TokenizedRow]]) -> list[AnySample]:
    """Those that teach to say nothing; a prompt alone teaches nothing by itself."""
    return [s for s, row in pairs if s.messages and row.supervised and not s.reference.strip()]


def _two_bos(row: TokenizedRow, bos: int | None) -> bool:
    return bos is not None and any(one.input_ids[:2] == [bos, bos] for one in row.sequences)


def _endless(row: TokenizedRow, special: Sequence[int]) -> bool:
    """Whether an answer that is not cut ends without a special token; some templates do so."""
    if isinstance(row, LabelledRow):
        return False  # a decoder's target is always closed
    return any(
        label != IGNORE and after == IGNORE and label not in special
        for one in row.sequences
        for label, after in zip(
            one.labels, [*one.labels[1:], one.labels[-1] if one.truncated else IGNORE], strict=True
        )
    )


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """By nearest rank; `lengths` is sorted."""
    if not lengths:
        return {}
    ranks = {name: lengths[(len(lengths) - 1) * p // 100] for name, p in _PERCENTILES.items()}
    return {"min": lengths[0], **ranks, "max": lengths[-1]}


def _histogram(lengths: Sequence[int]) -> list[list[int]]:
    """At most `_BINS` bins of 1, 2 or 5 times a power of ten tokens; `lengths` is sorted."""
    if not lengths:
        return []
    span = lengths[-1] - lengths[0] + 1
    width = next(
        step
        for power in range(12)
        for step in (10**power, 2 * 10**power, 5 * 10**power)
        if span // step + 2 <= _BINS or step > span
    )
    first = lengths[0] // width * width
    counts = [0] * ((lengths[-1] - first) // width + 1)
    for length in lengths:
        counts[(length - first) // width] += 1
    return [[first + i * width, first + (i + 1) * width, n] for i, n in enumerate(counts)]
