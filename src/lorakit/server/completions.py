"""`POST /v1/completions`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import Response

from lorakit.engine.requests import AnswerPiece, ChosenToken
from lorakit.server.adapters import adapter_named
from lorakit.server.chat import finite
from lorakit.server.event_streams import EventStream, client_of, while_wanted, whole_response
from lorakit.server.open_answers import Answer, Desk, finish_reason
from lorakit.server.payloads import CompletionRequest
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.replies import Completion, CompletionChoice, CompletionLogprobs


async def complete(
    request: Request, asked: CompletionRequest, desk: Desk, prompts: Prompts
) -> Response:
    """Goes on from each prompt; the choices are numbered prompt by prompt.

    Raises:
        ApiError, InputError: it cannot be.
    """
    adapter = adapter_named(desk.engine, asked.model)
    deadline, texts = desk.deadline(), asked.prompts()
    desk.require_room(len(texts) * asked.choices)
    work = prompts.of_texts(adapter, texts, client_of(request))
    tokens = await while_wanted(request, work, deadline, desk.late())
    answers = await desk.hand_in(tokens, adapter, asked, deadline)
    ident, created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
    with_logprobs = asked.rivals is not None
    written = [0] * len(answers)  # characters whose tokens were sent, an answer

    def completion(choices: list[CompletionChoice]) -> Completion:
        return {
            "id": ident,
            "object": "text_completion",
            "created": created,
            "model": asked.model,
            "choices": choices,
        }

    def reply(texts: list[Answer]) -> Completion:
        choices: list[CompletionChoice] = [
            {
                "index": number,
                "text": answer.text,
                "logprobs": _logprobs(answer.logprobs, 0) if with_logprobs else None,
                "finish_reason": answer.finish_reason,
            }
            for number, answer in enumerate(texts)
        ]
        return {**completion(choices), "usage": answers.usage}

    def piece_of(number: int, piece: AnswerPiece) -> Completion:
        logprobs = _logprobs(piece.logprobs, written[number]) if with_logprobs else None
        written[number] += sum(len(token.text) for token in piece.logprobs)
        made = completion(
            [
                {
                    "index": number,
                    "text": piece.text,
                    "logprobs": logprobs,
                    "finish_reason": finish_reason(piece),
                }
            ]
        )
        if asked.include_usage:
            made["usage"] = None
        return made

    def counts() -> Completion:
        return {**completion([]), "usage": answers.usage}

    if not asked.stream:
        return await whole_response(request, answers, reply)
    return EventStream(answers, (), piece_of, counts if asked.include_usage else None)


def _logprobs(tokens: Sequence[ChosenToken], start: int) -> CompletionLogprobs:
    offsets, offset = [], start
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [{r.text: finite(r.logprob) for r in token.top} for token in tokens],
        "text_offset": offsets,
    }
