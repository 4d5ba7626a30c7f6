"""`POST /v1/chat/completions`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fastapi import Request
from fastapi.responses import Response

from lorakit.engine.requests import AnswerPiece, ChosenToken, TokenLogprob
from lorakit.server.bodies import client_of
from lorakit.server.event_streams import Kind, respond, while_wanted
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Answer, Desk, finish_reason
from lorakit.server.payloads import ChatRequest
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.replies import (
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    Rival,
)

_KIND = Kind("chatcmpl", "chat.completion", "chat.completion.chunk")


async def chat(request: Request, asked: ChatRequest, desk: Desk, prompts: Prompts) -> Response:
    """Answers a conversation.

    Raises:
        ApiError, InputError: it cannot be.
    """
    caller = caller_of(request)
    adapter = await desk.adapter(asked.model, caller)
    deadline = desk.deadline()
    desk.require_room(asked.choices)
    size = len(await request.body())
    work = prompts.of_chat(adapter, asked, client_of(request), size)
    prompt = await while_wanted(request, work, deadline, desk.late())
    given = [prompt.input_ids], adapter, asked, deadline, prompt.pictures
    answers = await desk.hand_in(*given, owner=caller.owner)

    def logprobs(tokens: Iterable[ChosenToken]) -> ChatLogprobs | None:
        return None if asked.rivals is None else _logprobs(tokens)

    def whole(number: int, answer: Answer) -> ChatChoice:
        return {
            "index": number,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
        }

    def piece_of(number: int, piece: AnswerPiece) -> ChatChunkChoice:
        return {
            "index": number,
            "delta": {"content": piece.text} if piece.text or piece.logprobs else {},
            "logprobs": logprobs(piece.logprobs),
            "finish_reason": finish_reason(piece),
        }

    return await respond(request, asked, answers, _KIND, whole, piece_of, _role)


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
