"""How right predicted labels are: counts that add up over batches and processes, and their scores.

Accuracy, precision, recall and F1 have scikit-learn's definitions (macro: the mean over the classes
that occur or are predicted), entities in BIO tags those of conlleval (Tjong Kim Sang and De Meulder
2003, doi:10.3115/1119176.1119195).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.models.loss import IGNORE

if TYPE_CHECKING:
    import torch

_BIO = re.compile(r"O|[BI]-.+")
Span = tuple[int, int, str]


@dataclass(frozen=True)
class ClassScore:
    """One class: its rows (or words), and how well it was found."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class LabelScorer:
    """Counts and scores for the classes `names`; `words` says that there is a label a word."""

    names: tuple[str, ...]
    words: bool = False

    @property
    def entities(self) -> bool:
        """Whether the labels are BIO tags, so that whole entities are scored too."""
        tags = self.words and all(_BIO.fullmatch(name) for name in self.names)
        return tags and any(name != "O" for name in self.names)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the scores."""
        return ("accuracy", "f1", *(("entity_f1",) if self.entities else ()))

    @property
    def size(self) -> int:
        """The number of counts."""
        return 3 * len(self.names) + 3

    def count(self, predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The counts (size,), float64: per class right, predicted and actual; then of entities.

        Args:
            predicted, labels: int64 (rows, labels of a row), `IGNORE` where there is no label.
        """
        import torch

        predicted, labels = predicted.cpu(), labels.cpu()
        keep = labels != IGNORE
        found, actual = predicted[keep], labels[keep]
        classes = len(self.names)
        parts = [
            torch.bincount(values, minlength=classes).double()
            for values in (actual[found == actual], found, actual)
        ]
        entities = torch.zeros(3, dtype=torch.float64)
        for row in range(len(labels) if self.entities else 0):
            wanted, got = (
                entity_spans([self.names[i] for i in tags[row][keep[row]].tolist()])
                for tags in (labels, predicted)
            )
            entities += torch.tensor([len(wanted & got), len(got), len(wanted)])
        return torch.cat([*parts, entities])

    def scores(self, counts: torch.Tensor) -> dict[str, float]:
        """`accuracy` and macro `f1`, and for BIO tags `entity_f1`, over all entities together."""
        right, _, actual = counts[: 3 * len(self.names)].reshape(3, -1)
        occurring = [score.f1 for score in self.by_class(counts) if score is not None]
        scores = {
            "accuracy": float(right.sum() / actual.sum().clamp(min=1)),
            "f1": sum(occurring) / max(len(occurring), 1),
        }
        if self.entities:
            scores["entity_f1"] = _f1(*counts[-3:].tolist())
        return scores

    def by_class(self, counts: torch.Tensor) -> list[ClassScore | None]:
        """The score of each class; None for one that neither occurs nor is predicted."""
        table = counts[: 3 * len(self.names)].reshape(3, -1).T.tolist()
        return [
            ClassScore(
                label=name,
                rows=int(actual),
                precision=right / found if found else 0.0,
                recall=right / actual if actual else 0.0,
                f1=_f1(right, found, actual),
            )
            if found or actual
            else None
            for name, (right, found, actual) in zip(self.names, table, strict=True)
        ]


def entity_spans(tags: Sequence[str]) -> set[Span]:
    """The entities in BIO tags as (start, end, kind); an I that continues nothing begins one."""
    spans: set[Span] = set()
    start, kind = 0, ""
    for i, tag in enumerate((*tags, "O")):
        begins = tag[:2] == "B-" or tag[2:] != kind
        if kind and begins:
            spans.add((start, i, kind))
        if begins:
            start, kind = i, tag[2:]
    return spans


def _f1(right: float, found: float, actual: float) -> float:
    return 2 * right / (found + actual) if found + actual else 0.0
