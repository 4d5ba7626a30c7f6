"""How well a classifier's adapter labels rows, beside always giving the most frequent label.

A bare base model has no head for the labels, and one that was never trained says nothing; what an
adapter has to beat is the label that most rows have. Scores are the objective's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.label_rows import LabelledRow, notice_unseen
from lorakit.data.labelled import LabelledSample, check_labels, count_labels, label_name
from lorakit.data.masking import IGNORE
from lorakit.data.scores import ClassScore, LabelScorer
from lorakit.errors import InputError
from lorakit.evaluation.held_out import evaluating, longest_first
from lorakit.models.load import most_tokens
from lorakit.objectives.batch_sums import Loss, added
from lorakit.objectives.registry import default_objective

if TYPE_CHECKING:
    import torch

    from lorakit.adapters.open import OpenAdapter


@dataclass(frozen=True)
class Prediction:
    """One row: its texts or words, its labels (one, or one a word), and the predicted ones.

    A word that was cut off or has no token has None for a prediction. `confidence` is the
    probability of what was predicted, the mean over the words.
    """

    texts: list[str]
    labels: list[str]
    predicted: list[str | None]
    confidence: float


@dataclass(frozen=True)
class LabelEvaluation:
    """Scores by metric, of the most frequent label and of the adapter, and what each row got.

    `classes` has one entry for each label that occurs or was predicted. `seconds` is wall time.
    """

    rows: int
    most_frequent: str
    scores: dict[str, dict[str, float]]
    classes: list[ClassScore]
    predictions: list[Prediction]
    notices: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain JSON types."""
        return asdict(self)


def evaluate_labels(
    opened: OpenAdapter,
    samples: Sequence[LabelledSample],
    *,
    batch_size: int = 16,
    max_length: int = 1024,
) -> LabelEvaluation:
    """Scores a classifier on `samples`.

    Args:
        batch_size: rows at a time, of like length; the result does not depend on it.
        max_length: tokens of a row that are read.

    Raises:
        InputError: there are no samples, or one has a label that the adapter does not know.
    """
    if not samples:
        raise InputError("there are no rows to evaluate: give a file that has some")
    check_labels(samples, opened.labels)
    began = time.perf_counter()
    model, tokenizer = opened.model, opened.tokenizer
    objective: Any = default_objective(str(opened.task_type))
    scorer = objective.scorer = LabelScorer(tuple(opened.labels), objective.words)
    number_of = {name: i for i, name in enumerate(opened.labels)}
    length = most_tokens(model, max_length)
    rows = [objective.to_row(sample, tokenizer, length, number_of) for sample in samples]
    known = opened.manifest.labels if opened.manifest and opened.manifest.labels else {}
    counts = known.get("counts") or count_labels(samples)
    usual = max(opened.labels, key=lambda name: counts.get(name, 0))

    collate, forward = objective.collator(tokenizer), objective.forward(model)
    predictions: list[Prediction | None] = [None] * len(rows)
    tuned: dict[str, torch.Tensor] = {}
    base: dict[str, torch.Tensor] = {}
    for chosen, batch in evaluating(model, rows, longest_first(rows, batch_size), collate):
        labels = batch["labels"]
        total, logits = forward.label_logits(batch)
        confidence, predicted = logits.softmax(-1).max(-1)
        loss = Loss(total, objective.count(batch), {"counts": scorer.count(predicted, labels)})
        tuned = added(tuned, loss.sums())
        always = predicted.new_full(predicted.shape, number_of[usual])
        base = added(base, {"counts": scorer.count(always, labels)})
        for row, i in enumerate(chosen):
            keep = labels[row] != IGNORE
            found = [opened.labels[n] for n in predicted[row][keep].tolist()]
            sure = float(confidence[row][keep].mean())
            predictions[i] = _prediction(samples[i], rows[i], found, sure)
    scores, beaten = objective.held_out(tuned), scorer.scores(base["counts"])
    return LabelEvaluation(
        rows=len(samples),
        most_frequent=usual,
        scores={
            **{name: {"base": value, "tuned": scores[name]} for name, value in beaten.items()},
            "loss": {"tuned": scores["loss"]},
        },
        classes=[score for score in scorer.by_class(tuned["counts"]) if score],
        predictions=[prediction for prediction in predictions if prediction],
        notices=[*_notice_cut(rows, length), *notice_unseen(rows)],
        seconds=round(time.perf_counter() - began, 2),
    )


def _notice_cut(rows: Sequence[LabelledRow], length: int) -> list[str]:
    cut = [row.where for row in rows if row.cut]
    if not cut:
        return []
    return [f"{len(cut):,} of {len(rows):,} rows are cut at {length} tokens (first: {cut[0]})"]


def _prediction(
    sample: LabelledSample, row: LabelledRow, found: list[str], confidence: float
) -> Prediction:
    labels = [label_name(label) for label in sample.labels]
    predicted: list[str | None] = [None] * len(labels)
    for place, name in zip(row.words or (0,), found, strict=True):
        predicted[place] = name
    return Prediction(list(sample.texts), labels, predicted, round(confidence, 4))
