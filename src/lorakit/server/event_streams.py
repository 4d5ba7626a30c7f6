"""Answers as HTTP responses: whole, or event by event, and freed when their client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lorakit.engine.requests import AnswerPiece
from lorakit.errors import LorakitError
from lorakit.server.errors import CLIENT_LEFT, ApiError, error_content
from lorakit.server.open_answers import Answer, OpenAnswers
from lorakit.server.replies import event

Result = TypeVar("Result")

_DONE = b"data: [DONE]\n\n"


def client_of(request: Request) -> str:
    """Who asks, as far as a fair order goes: an address."""
    return request.client.host if request.client else ""


async def while_wanted(
    request: Request, work: Coroutine[Any, Any, Result], deadline: float, late: ApiError
) -> Result:
    """The result of `work`, which is given up when the client leaves or the deadline is over.

    Raises:
        ApiError: the client has left; `late`.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        seconds = max(deadline - asyncio.get_running_loop().time(), 0)
        await asyncio.wait((task, leaving), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(CLIENT_LEFT, "the client has left") if leaving.done() else late
    finally:
        await _cancel(task, leaving)


async def whole_response(
    request: Request, answers: OpenAnswers, content: Callable[[list[Answer]], Any]
) -> Response:
    """The response of `content(all answers)`; a client that leaves ends them.

    Raises:
        ApiError: as `OpenAnswers.pieces`.
    """
    work = asyncio.ensure_future(answers.whole())
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=CLIENT_LEFT)
        return JSONResponse(content(work.result()))
    finally:
        answers.close()
        await _cancel(work, leaving)


class EventStream(StreamingResponse):
    """Answers as server-sent events, in OpenAI's order: pieces, the counts if wanted, `[DONE]`.

    Args:
        opening: sent before anything is written.
        content: the event of a piece with its answer's number.
        closing: gives the last event, when all is written; None for none.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        answers: OpenAnswers,
        opening: Iterable[Any],
        content: Callable[[int, AnswerPiece], Any],
        closing: Callable[[], Any] | None,
    ) -> None:
        self._answers = answers
        events = _events(answers, opening, content, closing)
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def _events(
    answers: OpenAnswers,
    opening: Iterable[Any],
    content: Callable[[int, AnswerPiece], Any],
    closing: Callable[[], Any] | None,
) -> AsyncIterator[bytes]:
    try:
        for first in opening:
            yield event(first)
        async with aclosing(answers.pieces()) as pieces:
            async for number, piece in pieces:
                if piece.text or piece.logprobs or piece.finish_reason:
                    yield event(content(number, piece))
        if closing is not None:
            yield event(closing())
    except ApiError as error:  # the status is out already
        yield event(error_content(error.status_code, error.detail, str(error.status_code)))
    yield _DONE


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError, LorakitError, ApiError):
            await task


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
