"""How well a classifier's adapter labels rows, beside always giving the most frequent label.

A bare base model has no head for the labels, and one that was never trained says nothing; what an
adapter has to beat is the label that most rows have. Counting and scores are `data/scores.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.batches import LabelCollator
from lorakit.data.label_rows import LabelledRow, notice_unseen, tokenize_sequence, tokenize_words
from lorakit.data.labelled import LabelledSample, check_labels, count_labels, label_name
from lorakit.data.masking import IGNORE
from lorakit.data.scores import ClassScore, LabelScorer
from lorakit.errors import InputError, did_you_mean
from lorakit.models.label_loss import LabelLoss
from lorakit.models.load import most_tokens

if TYPE_CHECKING:
    from lorakit.adapters.open import OpenAdapter

METRICS = ("accuracy", "f1", "entity_f1", "loss")


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
    on_progress: Callable[[int, int], None] | None = None,
) -> LabelEvaluation:
    """Scores a classifier on `samples`.

    Args:
        batch_size: rows at a time, of like length; the result does not depend on it.
        max_length: tokens of a row that are read.
        on_progress: called with how many of how many rows are done.

    Raises:
        InputError: there are no samples, or one has a label that the adapter does not know.
    """
    import torch

    if not samples:
        raise InputError("there are no rows to evaluate: give a file that has some")
    check_labels(samples, opened.labels)
    began = time.perf_counter()
    model, tokenizer = opened.model, opened.tokenizer
    words = opened.task_type == "TOKEN_CLS"
    scorer = LabelScorer(tuple(opened.labels), words)
    number_of = {name: i for i, name in enumerate(opened.labels)}
    length = most_tokens(model, max_length)
    to_row = tokenize_words if words else tokenize_sequence
    rows = [to_row(sample, tokenizer, length, number_of) for sample in samples]
    known = opened.manifest.labels if opened.manifest and opened.manifest.labels else {}
    counts = known.get("counts") or count_labels(samples)
    usual = max(opened.labels, key=lambda name: counts.get(name, 0))

    collate = LabelCollator(int(tokenizer.pad_token_id), one_label=not words)
    loss = LabelLoss(model)
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    predictions: list[Prediction | None] = [None] * len(rows)
    tuned, base = (torch.zeros(scorer.size, dtype=torch.float64) for _ in range(2))
    total, labels_seen = 0.0, 0
    model.eval()
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        batch = {k: v.to(device) for k, v in collate([rows[i] for i in chosen]).items()}
        labels = batch["labels"]
        with torch.inference_mode():
            batch_total, count, logits = loss.with_logits(model, batch)
        total, labels_seen = total + float(batch_total), labels_seen + int(count)
        confidence, predicted = logits.softmax(-1).max(-1)
        tuned += scorer.count(predicted, labels)
        base += scorer.count(torch.full_like(predicted, number_of[usual]), labels)
        for row, i in enumerate(chosen):
            keep = labels[row] != IGNORE
            found = [opened.labels[n] for n in predicted[row][keep].tolist()]
            sure = float(confidence[row][keep].mean())
            predictions[i] = _prediction(samples[i], rows[i], found, sure)
        if on_progress:
            on_progress(at + len(chosen), len(rows))
    scores = {
        name: {"base": value, "tuned": scorer.scores(tuned)[name]}
        for name, value in scorer.scores(base).items()
    }
    return LabelEvaluation(
        rows=len(samples),
        most_frequent=usual,
        scores={**scores, "loss": {"tuned": total / labels_seen}},
        classes=[score for score in scorer.by_class(tuned) if score],
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


def check_metrics(names: Sequence[str], labels: Sequence[str], words: bool) -> None:
    """Raises InputError for a metric that a classifier of these labels does not have."""
    scorer = LabelScorer(tuple(labels), words)
    known = [name for name in METRICS if name != "entity_f1" or scorer.entities]
    for name in names:
        if name not in known:
            raise InputError(
                f"--metrics: '{name}' is not a metric of this classifier"
                f"{did_you_mean(name, known)}; there are {', '.join(known)}"
            )
