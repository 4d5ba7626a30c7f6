"""What a model makes of prompts without writing anything, for the routes that ask for that."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from fastapi import Request

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
    reading: Coroutine[Any, Any, list[list[int]]],
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
    tokens = await while_wanted(request, reading, deadline, desk.late())
    owner, size = caller_of(request).owner, at_once(desk)
    made: list[Answer] = []
    for first in range(0, len(tokens), size):
        part = tokens[first : first + size]
        answers = await desk.hand_in(part, adapter, asked, deadline, owner=owner)
        try:
            made += await while_wanted(request, answers.whole())
        finally:
            answers.close()
    total = sum(map(len, tokens))
    usage: Usage = {
        "prompt_tokens": total,
        "completion_tokens": 0,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    return made, usage
