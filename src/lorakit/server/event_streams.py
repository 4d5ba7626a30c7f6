"""Answers as HTTP responses: whole, or event by event, and freed when their client leaves."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lorakit.engine.requests import AnswerPiece
from lorakit.errors import LorakitError
from lorakit.server.errors import CLIENT_LEFT, ApiError, error_content
from lorakit.server.open_answers import Answer, OpenAnswers
from lorakit.server.replies import event
from lorakit.server.sampling_fields import SamplingFields

Result = TypeVar("Result")


class Kind(NamedTuple):
    """What a reply calls itself: the beginning of its id, and its `object`, whole and in events."""

    prefix: str
    whole: str
    piece: str


_DONE = b"data: [DONE]\n\n"


async def while_wanted(
    request: Request,
    work: Coroutine[Any, Any, Result],
    deadline: float | None = None,
    late: ApiError | None = None,
) -> Result:
    """The result of `work`, which is given up when the client leaves or the deadline is over.

    Raises:
        ApiError: the client has left; `late`.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        now = asyncio.get_running_loop().time()
        seconds = None if deadline is None else max(deadline - now, 0)
        await asyncio.wait((task, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if late is None or leaving.done():
            raise ApiError(CLIENT_LEFT, "the client has left")
        raise late
    finally:
        for each in (task, leaving):
            each.cancel()
            with suppress(asyncio.CancelledError, LorakitError, ApiError):
                await each


async def respond(
    request: Request,
    asked: SamplingFields,
    answers: OpenAnswers,
    kind: Kind,
    whole: Callable[[int, Answer], Any],
    pieces: Callable[[int, AnswerPiece], Iterable[Any]],
    opening: Callable[[int], Any] | None = None,
    best: Callable[[list[Answer]], list[Answer]] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Response:
    """The answers in OpenAI's form, at once or in events; a client that leaves ends them.

    Args:
        whole: the choice of an answer's number and the answer.
        pieces: the choices of events, of an answer's number and a piece of it.
        opening: the choice of an event before anything is written.
        best: those of whole answers that are returned; None for all.
        more: further fields of a whole reply.

    Raises:
        ApiError: as `OpenAnswers.pieces`; the client has left.
    """
    same = {"created": int(time.time()), "model": asked.model}
    ident = f"{kind.prefix}-{uuid.uuid4().hex}"

    def reply(name: str, choices: list[Any], **usage: Any) -> dict[str, Any]:
        return {"id": ident, "object": name, **same, "choices": choices, **usage}

    if not asked.stream:
        try:
            made = await while_wanted(request, answers.whole())
        finally:
            answers.close()
        kept = made if best is None else best(made)
        choices = [whole(number, answer) for number, answer in enumerate(kept)]
        return JSONResponse(reply(kind.whole, choices, usage=answers.usage, **(more or {})))

    def chunk(choice: Any) -> dict[str, Any]:
        if not asked.include_usage:
            return reply(kind.piece, [choice])
        so_far = answers.usage if asked.continuous_usage else None
        return reply(kind.piece, [choice], usage=so_far)

    events = _events(
        answers,
        (chunk(opening(i)) for i in range(len(answers)) if opening),
        lambda number, some: [chunk(piece) for piece in pieces(number, some)],
        (lambda: reply(kind.piece, [], usage=answers.usage)) if asked.include_usage else None,
    )
    return EventStream(answers, events)


class EventStream(StreamingResponse):
    """Answers as server-sent events, which end with their client."""

    media_type = "text/event-stream"

    def __init__(self, answers: OpenAnswers, events: AsyncIterator[bytes]) -> None:
        self._answers = answers
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def _events(
    answers: OpenAnswers,
    opening: Iterable[Any],
    content: Callable[[int, AnswerPiece], Iterable[Any]],
    closing: Callable[[], Any] | None,
) -> AsyncIterator[bytes]:
    """Events in OpenAI's order: pieces, the counts if wanted, `[DONE]`.

    Args:
        opening: sent before anything is written.
        content: the events of a piece with its answer's number.
        closing: gives the last event, when all is written; None for none.
    """
    try:
        for first in opening:
            yield event(first)
        async with aclosing(answers.pieces()) as pieces:
            async for number, piece in pieces:
                if piece.text or piece.logprobs or piece.finish_reason:
                    for one in content(number, piece):
                        yield event(one)
        if closing is not None:
            yield event(closing())
    except ApiError as error:  # the status is out already
        yield event(error_content(error.status_code, error.detail, str(error.status_code)))
    yield _DONE


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
