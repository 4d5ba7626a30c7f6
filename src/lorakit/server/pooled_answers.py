"""What a model makes of prompts without writing anything, for the routes that ask for that."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from fastapi import Request

from lorakit.server.event_streams import while_wanted
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Answer, Desk, OpenAnswers
from lorakit.server.payloads import Pooled


async def pooled(
    request: Request,
    asked: Pooled,
    adapter: str | None,
    reading: Coroutine[Any, Any, list[list[int]]],
    desk: Desk,
    deadline: float,
) -> tuple[list[Answer], OpenAnswers]:
    """The answer to each prompt, and all of them, for their counts.

    Args:
        reading: gives the prompts' tokens.
        deadline: of `desk.deadline()`, when the request came.

    Raises:
        ApiError, InputError: there is none.
    """
    tokens = await while_wanted(request, reading, deadline, desk.late())
    owner = caller_of(request).owner
    answers = await desk.hand_in(tokens, adapter, asked, deadline, owner=owner)
    try:
        return await while_wanted(request, answers.whole()), answers
    finally:
        answers.close()
