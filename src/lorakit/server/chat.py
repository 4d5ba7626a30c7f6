"""`POST /v1/chat/completions`."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Iterable

from fastapi import Request
from fastapi.responses import Response

from lorakit.engine.requests import AnswerPiece, ChosenToken, TokenLogprob
from lorakit.server.adapters import adapter_named
from lorakit.server.event_streams import EventStream, client_of, while_wanted, whole_response
from lorakit.server.open_answers import Answer, Desk, finish_reason
from lorakit.server.payloads import ChatRequest
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.replies import (
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    Rival,
)


async def chat(request: Request, asked: ChatRequest, desk: Desk, prompts: Prompts) -> Response:
    """Answers a conversation.

    Raises:
        ApiError, InputError: it cannot be.
    """
    adapter = adapter_named(desk.engine, asked.model)
    deadline = desk.deadline()
    desk.require_room(asked.choices)
    size = len(await request.body())
    work = prompts.of_chat(adapter, asked, client_of(request), size)
    prompt = await while_wanted(request, work, deadline, desk.late())
    answers = await desk.hand_in([prompt], adapter, asked, deadline)
    ident, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
    with_logprobs = asked.rivals is not None

    def reply(written: list[Answer]) -> ChatCompletion:
        return {
            "id": ident,
            "object": "chat.completion",
            "created": created,
            "model": asked.model,
            "choices": [
                {
                    "index": number,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "logprobs": _logprobs(answer.logprobs) if with_logprobs else None,
                    "finish_reason": answer.finish_reason,
                }
                for number, answer in enumerate(written)
            ],
            "usage": answers.usage,
        }

    def chunk(choices: list[ChatChunkChoice]) -> ChatChunk:
        made: ChatChunk = {
            "id": ident,
            "object": "chat.completion.chunk",
            "created": created,
            "model": asked.model,
            "choices": choices,
        }
        if asked.include_usage:
            made["usage"] = None
        return made

    def piece_of(number: int, piece: AnswerPiece) -> ChatChunk:
        delta: Delta = {"content": piece.text} if piece.text or piece.logprobs else {}
        return chunk(
            [
                {
                    "index": number,
                    "delta": delta,
                    "logprobs": _logprobs(piece.logprobs) if with_logprobs else None,
                    "finish_reason": finish_reason(piece),
                }
            ]
        )

    def counts() -> ChatChunk:
        return {**chunk([]), "usage": answers.usage}

    if not asked.stream:
        return await whole_response(request, answers, reply)
    roles = (chunk([_role(number)]) for number in range(len(answers)))
    return EventStream(answers, roles, piece_of, counts if asked.include_usage else None)


def finite(logprob: float) -> float:
    """A log-probability as JSON can write it; OpenAI writes -9999 for that of what cannot be."""
    return max(logprob, -9999.0) if not math.isnan(logprob) else -9999.0


def _role(number: int) -> ChatChunkChoice:
    return {
        "index": number,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def _logprobs(tokens: Iterable[ChosenToken]) -> ChatLogprobs:
    content = [{**_rival(t), "top_logprobs": [_rival(r) for r in t.top]} for t in tokens]
    return {"content": content, "refusal": None}  # type: ignore[typeddict-item]


def _rival(token: TokenLogprob) -> Rival:
    # A token may hold a part of a character, which then reads as U+FFFD: its bytes are not known.
    own = None if "\ufffd" in token.text else list(token.text.encode())
    return {"token": token.text, "logprob": finite(token.logprob), "bytes": own}
