"""Whether the mathematics of a completion equals the row's solution (the library math-verify).

What is parsed and how is as in TRL's `accuracy_reward`. The library's own limits of time are alarms
of the main thread; where this is another one, only those of the caller hold.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

from lorakit.rewards.completion_text import behind, text_of

_SECONDS_TO_PARSE, _SECONDS_TO_VERIFY = 10, 5


@dataclass(frozen=True)
class MathAnswer:
    """1 where the answer equals the solution, else 0; None where the solution cannot be parsed.

    Attributes:
        column: with the solutions.
        after: a mark, such as `</think>`, behind whose last place the answer stands.
    """

    column: str = "solution"
    after: str | None = None
    main: ClassVar[str] = "column"

    def __post_init__(self) -> None:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "it needs the library math-verify: pip install 'lorakit[rl]'"
            ) from error

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        solutions = columns[self.column]
        return [
            self._score(behind(text_of(completion), self.after), solution)
            for completion, solution in zip(completions, solutions, strict=True)
        ]

    def _score(self, text: str, solution: Any) -> float | None:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify

        if solution is None:
            return None
        limited = threading.current_thread() is threading.main_thread()
        if not limited:
            for name in ("math_verify.parser", "math_verify.grader"):
                logging.getLogger(name).setLevel(logging.ERROR)
        parsing, verifying = (_SECONDS_TO_PARSE, _SECONDS_TO_VERIFY) if limited else (None, None)
        gold = parse(str(solution), parsing_timeout=parsing)
        if not gold:
            return None
        found = parse(
            text,
            extraction_config=[
                LatexExtractionConfig(
                    normalization_config=NormalizationConfig(units=True),
                    boxed_match_priority=0,
                    try_extract_without_anchor=False,
                )
            ],
            extraction_mode="first_match",
            parsing_timeout=parsing,
        )
        return float(verify(gold, found, timeout_seconds=verifying))
