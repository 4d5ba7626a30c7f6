"""A penalty of repeated n-grams (arXiv:2502.03373, appendix C.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Repetition:
    """`(1 - unique n-grams / n-grams) * max_penalty`, of tokens; 0 for fewer tokens than n.

    Attributes:
        ngram_size: n.
        max_penalty: 0 or below.
    """

    ngram_size: int = 3
    max_penalty: float = -1.0
    main: ClassVar[str] = "max_penalty"

    def __post_init__(self) -> None:
        if not isinstance(self.ngram_size, int) or self.ngram_size < 1:
            raise ValueError(f"ngram_size is {self.ngram_size!r}: give a number from 1 on")
        if not self.max_penalty <= 0:
            raise ValueError(f"max_penalty is {self.max_penalty!r}: give 0 or a number below")

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [self._penalty(ids) for ids in completion_ids]

    def _penalty(self, ids: list[int]) -> float:
        ngrams = list(zip(*(ids[i:] for i in range(self.ngram_size)), strict=False))
        if not ngrams:
            return 0.0
        repeated = 1 - len(set(ngrams)) / len(ngrams)
        return repeated * self.max_penalty if repeated else 0.0
