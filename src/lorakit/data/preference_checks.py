"""What a user should know of preference pairs and judged answers: lengths, contradictions, prompts.

As in `checks`, nothing here changes or refuses a row: a pair of two identical answers, or of
answers to two prompts, is an error where it is read (`preference_rows`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from lorakit.data.conversations import Message
from lorakit.data.findings import AnySample, Finding, finding
from lorakit.data.judged_rows import JudgedSample
from lorakit.data.masking import TokenizedRow
from lorakit.data.preference_rows import PairSample
from lorakit.data.preference_tokens import JudgedRow, PairRow
from lorakit.data.too_long import Limit

BIASED = 0.65
"""Chosen answers that are longer (or shorter) in this share of the pairs or more are reported."""
ALIKE = 1.1
"""Unless the median lengths of both kinds are within this factor of each other."""
FEW = 20
"""Of fewer pairs the share says nothing."""

Pairs = Sequence[tuple[AnySample, TokenizedRow]]


@dataclass(frozen=True)
class PreferenceFigures:
    """Chosen and rejected answers in numbers; of judged ones the desirable and undesirable.

    Attributes:
        chosen, rejected: how many answers there are of either kind.
        chosen_tokens, rejected_tokens: their median lengths, before cutting; 0 of none.
        chosen_longer: the share of pairs whose chosen answer is longer, a tie counting as half;
            for judged answers the probability that a desirable one is longer than an undesirable
            one (the area under the ROC curve). None where one kind is missing.
    """

    chosen: int
    rejected: int
    chosen_tokens: float
    rejected_tokens: float
    chosen_longer: float | None


def preference_figures(rows: Iterable[TokenizedRow]) -> PreferenceFigures | None:
    """The numbers of rows of pairs or judged answers; None of other rows."""
    better: list[int] = []
    worse: list[int] = []
    paired = True
    for row in rows:
        if isinstance(row, PairRow):
            chosen, rejected = map(_length, row.parts)
            better.append(chosen)
            worse.append(rejected)
        elif isinstance(row, JudgedRow):
            paired = False
            (better if row.desirable else worse).append(_length(row))
    if not better and not worse:
        return None
    longer = None
    if better and worse:
        longer = _paired(better, worse) if paired else _probability(better, worse)
    middle, other = (float(median(found)) if found else 0.0 for found in (better, worse))
    return PreferenceFigures(len(better), len(worse), middle, other, longer)


def findings_of_preferences(
    train: Pairs, held_out: Pairs, left_out: Sequence[TokenizedRow], limit: Limit
) -> list[Finding]:
    """Everything that is looked for in pairs and judged answers; empty where there are none.

    Args:
        left_out: the rows that are too long to be used.
        limit: how many tokens of a row are read.
    """
    everything = [*train, *held_out]
    pairs = [(s, row) for s, row in everything if isinstance(s, PairSample)]
    judged = [(s, row) for s, row in everything if isinstance(s, JudgedSample)]
    equal = [row for row in left_out if _cut_to_equal(row)]
    found: list[Finding] = []
    if pairs or equal:
        longest = max((row.longest for row in equal), default=0)
        found += [
            finding(
                f"left out, as both answers are the same in {limit}",
                equal,
                len(everything) + len(left_out),
                limit.cure(longest) if equal else "",
            ),
            finding(
                "told apart by white space or case alone",
                [s for s, _ in pairs if _squeezed(s) == _squeezed(s, rejected=True)],
                len(everything),
                "that is all the preference there is to learn: drop them unless it is meant",
            ),
            finding(
                "judged over turns in which the user says different things",
                [s for s, _ in pairs if _said(s) != _said(s, rejected=True)],
                len(everything),
                "later answers have different prompts then: let the conversations differ in the "
                "last answer alone",
            ),
        ]
    if pairs or judged:
        found.append(
            finding(
                "contradicted by another row, which has the same answers the other way round",
                _contradicted([s for s, _ in everything]),
                len(everything),
                "they cancel each other out: keep the one that is right",
            )
        )
    found += _length_bias([(s.where, row) for s, row in everything])
    return found


def _length_bias(rows: Sequence[tuple[str, TokenizedRow]]) -> list[Finding]:
    """A finding if chosen answers are mostly the longer ones, or mostly the shorter ones."""
    kept = [row for _, row in rows]
    figures = preference_figures(kept)
    if figures is None or figures.chosen_longer is None:
        return []
    if min(figures.chosen, figures.rejected) < FEW:
        return []
    share = figures.chosen_longer
    shorter, longer_median = sorted((figures.chosen_tokens, figures.rejected_tokens))
    if 1 - BIASED < share < BIASED or longer_median < ALIKE * shorter:
        return []
    longer = share >= BIASED
    judged = any(isinstance(row, JudgedRow) for row in kept)
    names = ("desirable", "undesirable") if judged else ("chosen", "rejected")
    sign = 1 if longer else -1
    like = [
        row
        for row in kept
        if (isinstance(row, PairRow) and sign * (_length(row.parts[0]) - _length(row.parts[1])) > 0)
        or (
            isinstance(row, JudgedRow)
            and row.desirable
            and sign * (_length(row) - figures.rejected_tokens) > 0
        )
    ]
    than = f"the median {names[1]} one" if judged else f"the {names[1]} one"
    word = "longer" if longer else "shorter"
    what = (
        f"judged with a length bias: the {names[0]} answer is {word} than {than} "
        f"(medians {figures.chosen_tokens:g} and {figures.rejected_tokens:g} tokens)"
    )
    cure = (
        f"answers become {word} whatever they say: add rows in which the better answer is not the "
        f"{word} one"
    )
    if not judged:
        cure += ", or normalise by length (simpo; dpo with loss_type sigmoid_norm or ld_alpha)"
    return [finding(what, like, len(kept), cure)]


def _contradicted(samples: Sequence[AnySample]) -> list[AnySample]:
    """The samples whose judgement another one reverses."""

    def key(sample: AnySample, reverse: bool) -> tuple[str, ...] | None:
        if isinstance(sample, PairSample):
            answers = [_answers(sample), _answers(sample, rejected=True)]
            return sample.prompt_key, *(answers[::-1] if reverse else answers)
        if isinstance(sample, JudgedSample):
            return sample.prompt_key, sample.reference, str(sample.desirable != reverse)
        return None

    known = {key(sample, False) for sample in samples} - {None}
    return [sample for sample in samples if key(sample, True) in known]


def _answers(sample: PairSample, rejected: bool = False) -> str:
    return json.dumps(_behind(sample, rejected), sort_keys=True, ensure_ascii=False)


def _behind(sample: PairSample, rejected: bool) -> tuple[Message, ...]:
    """The messages behind the common prompt."""
    return (sample.rejected if rejected else sample).messages[sample.begin :]


def _squeezed(sample: PairSample, rejected: bool = False) -> list[dict[str, object]]:
    """The answers with their text in lower case and single spaces."""
    return [
        {**message, "content": " ".join(str(message["content"]).casefold().split())}
        for message in _behind(sample, rejected)
    ]


def _said(sample: PairSample, rejected: bool = False) -> list[str]:
    """What the user and the tools say behind the first answers."""
    behind = _behind(sample, rejected)
    return [str(message["content"]) for message in behind if message["role"] != "assistant"]


def _cut_to_equal(row: TokenizedRow) -> bool:
    if not isinstance(row, PairRow) or not all(part.supervised for part in row.parts):
        return False
    return row.parts[0].input_ids == row.parts[1].input_ids


def _length(row: TokenizedRow) -> int:
    """Tokens of a row's answers, what is cut off among them."""
    return row.supervised + row.cut


def _paired(better: Sequence[int], worse: Sequence[int]) -> float:
    pairs = list(zip(better, worse, strict=True))
    return sum((b > w) + 0.5 * (b == w) for b, w in pairs) / len(pairs)


def _probability(better: Sequence[int], worse: Sequence[int]) -> float:
    """That a random one of `better` is larger than one of `worse`, ties counting as half."""
    from bisect import bisect_left, bisect_right

    order = sorted(worse)
    wins = sum(0.5 * (bisect_left(order, b) + bisect_right(order, b)) for b in better)
    return wins / (len(better) * len(worse))
