"""Whether a completion is JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from lorakit.rewards.completion_text import text_of

KINDS = {"object": dict, "array": list, "string": str, "number": (int, float), "any": object}
_FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?```\s*", re.DOTALL)


@dataclass(frozen=True)
class JsonText:
    """1 where the completion is one JSON value and nothing else, else 0.

    Attributes:
        kind: of the value: object, array, string, number or any.
        fenced: it may stand between Markdown's fences.
    """

    kind: str = "any"
    fenced: bool = False
    main: ClassVar[str] = "kind"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: give one of {', '.join(KINDS)}")

    def __call__(self, completions: list[Any], **_: Any) -> list[float]:
        kind = KINDS[self.kind]
        found = (json_value(text_of(one), self.fenced) for one in completions)
        return [float(valid and isinstance(value, kind)) for valid, value in found]  # type: ignore[arg-type]


def json_value(text: str, fenced: bool) -> tuple[bool, Any]:
    """Whether `text` is JSON as RFC 8259 has it, and its value."""
    if fenced and (inner := _FENCE.fullmatch(text)):
        text = inner[1]
    try:
        return True, json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False, None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
