"""What a model makes of prompts without writing anything, for the routes that ask for that."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from typing import Any

from fastapi import Request

from lorakit.engine.pair_tokens import Encoded
from lorakit.server.event_streams import while_wanted
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Answer, Desk
from lorakit.server.payloads import Pooled
from lorakit.server.replies import Usage

_AT_ONCE = 64
"""Prompts of a request that are handed in together, so that a large one leaves room for others."""


def at_once(desk: Desk) -> int:
    """How many prompts of a request are handed in together."""
    return min(_AT_ONCE, desk.engine.max_rows + desk.limits.waiting)


async def pooled(
    request: Request,
    asked: Pooled,
    adapter: str | None,
    reading: Coroutine[Any, Any, Sequence[list[int] | Encoded]],
    desk: Desk,
    deadline: float,
) -> tuple[list[Answer], Usage]:
    """The answer to each prompt, and the counts of all of them.

    Args:
        reading: gives the prompts' tokens.
        deadline: of `desk.deadline()`, when the request came.

    Raises:
        ApiError, InputError: there is none.
    """
    read = await while_wanted(request, reading, deadline, desk.late())
    texts = [one if isinstance(one, Encoded) else Encoded(one) for one in read]
    owner, size = caller_of(request).owner, at_once(desk)
    made: list[Answer] = []
    for first in range(0, len(texts), size):
        part = texts[first : first + size]
        types = [one.types for one in part]
        tokens = [one.tokens for one in part]
        answers = await desk.hand_in(tokens, adapter, asked, deadline, owner=owner, types=types)
        try:
            made += await while_wanted(request, answers.whole())
        finally:
            answers.close()
    total = sum(len(one.tokens) for one in texts)
    usage: Usage = {
        "prompt_tokens": total,
        "completion_tokens": 0,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    return made, usage
