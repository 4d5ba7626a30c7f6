"""What a reward model gives to rows: scores of pairs, whose chosen answer should have the higher
one, or of conversations and texts by themselves.

A base model has no head for this, so that pairs are compared with a rule that needs no model: the
longer answer wins. A reward model that is no better has learned lengths.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorakit.bootstrap import score_interval
from lorakit.data.preference_checks import preference_figures
from lorakit.data.preference_rows import PairSample
from lorakit.errors import InputError
from lorakit.evaluation.held_out import evaluating, planned, rows_of
from lorakit.models.load import most_tokens
from lorakit.objectives.batch_sums import added

if TYPE_CHECKING:
    import torch

    from lorakit.adapters.open import OpenAdapter
    from lorakit.data.masking import TokenizedRow
    from lorakit.data.samples import Sample
    from lorakit.objectives.reward import Reward

_SEED = 0  # of the bootstrap's draws


@dataclass(frozen=True)
class ScoredRow:
    """A row's scores: of a pair those of its chosen and its rejected answer, else one."""

    where: str
    scores: list[float]


@dataclass(frozen=True)
class RewardEvaluation:
    """Scores of pairs by metric, or the mean score of conversations, and what each row got.

    `interval` are the ends of the accuracy's 95% interval, over prompts; None where there are no
    pairs. `seconds` is wall time.
    """

    rows: int
    scores: dict[str, dict[str, float]]
    interval: tuple[float, float] | None
    scored: list[ScoredRow]
    notices: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain JSON types."""
        return asdict(self)


def evaluate_rewards(
    opened: OpenAdapter,
    objective: Reward,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    max_length: int = 1024,
) -> RewardEvaluation:
    """Scores `samples` with a reward model.

    Args:
        objective: what it has learned by.
        samples: all of them pairs, or none.
        batch_size: rows at a time; the result does not depend on it.
        max_length: tokens of a conversation that are read.

    Raises:
        InputError: there are no samples, or pairs among other rows.
    """
    if not samples:
        raise InputError("there are no rows to evaluate: give a file that has some")
    paired = [isinstance(sample, PairSample) for sample in samples]
    if len(set(paired)) > 1:
        other = samples[paired.index(not paired[0])]
        raise InputError(
            f"{other.where}: pairs and other rows are scored one kind at a time: divide the file"
        )
    began = time.perf_counter()
    length = most_tokens(opened.model, max_length)
    rows = rows_of(objective, opened.tokenizer, samples, length)
    scored, sums = scored_rows(opened, objective, rows, batch_size, pairs=paired[0])
    scores, interval = {"score": {"tuned": fmean(one.scores[0] for one in scored)}}, None
    if paired[0]:
        right = [_right(*one.scores) for one in scored]
        figures = preference_figures(rows)
        assert figures is not None
        assert figures.chosen_longer is not None
        scores = {name: {"tuned": value} for name, value in objective.held_out(sums).items()}
        scores["accuracy"]["longer"] = figures.chosen_longer
        interval = _interval(samples, right)
    return RewardEvaluation(
        len(samples), scores, interval, scored, _cut(rows, length), _since(began)
    )


def scored_rows(
    opened: OpenAdapter,
    objective: Reward,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    pairs: bool,
) -> tuple[list[ScoredRow], dict[str, torch.Tensor]]:
    """The scores of each row, and of pairs the sums of the objective's loss.

    Args:
        rows: all of them pairs (`pairs`), or none.
    """
    model, tokenizer = opened.model, opened.tokenizer
    forward = objective.forward(model)
    batches, collate = planned(objective, model, tokenizer, rows, batch_size)
    found: list[list[float]] = [[] for _ in rows]
    sums: dict[str, torch.Tensor] = {}
    for chosen, batch in evaluating(model, rows, batches, collate):
        scores = forward.sequence_scores(batch)
        if pairs:
            sums = added(sums, objective.loss_of(scores, batch).sums())
        parts = scores.tolist()
        for i, own in zip(chosen, zip(*[iter(parts)] * (1 + pairs), strict=True), strict=True):
            found[i] = [*own]
    return [ScoredRow(row.where, own) for row, own in zip(rows, found, strict=True)], sums


def _right(chosen: float, rejected: float) -> float:
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def _interval(samples: Sequence[Sample], right: Sequence[float]) -> tuple[float, float]:
    """Of the mean of `right` over draws of prompts."""
    prompts: dict[str, list[float]] = {}
    for sample, value in zip(samples, right, strict=True):
        prompts.setdefault(sample.prompt_key, []).append(value)
    units = [*prompts.values()]

    def mean(chosen: list[int]) -> float:
        return fmean(value for i in chosen for value in units[i])

    interval = score_interval(mean, len(units), _SEED)
    return interval.low, interval.high


def _cut(rows: Sequence[TokenizedRow], length: int) -> list[str]:
    cut = [row.where for row in rows if row.truncated]
    if not cut:
        return []
    return [f"{len(cut):,} of {len(rows):,} rows are cut at {length} tokens (first: {cut[0]})"]


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 2)
