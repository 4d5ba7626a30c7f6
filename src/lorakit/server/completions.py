"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request
from fastapi.responses import Response

from lorakit.engine.requests import AnswerPiece, ChosenToken
from lorakit.server.bodies import client_of
from lorakit.server.chat import finite
from lorakit.server.event_streams import Kind, respond, while_wanted
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Answer, Desk, finish_reason
from lorakit.server.payloads import CompletionRequest
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.replies import CompletionChoice, CompletionLogprobs

_KIND = Kind("cmpl", "text_completion", "text_completion")


async def complete(
    request: Request, asked: CompletionRequest, desk: Desk, prompts: Prompts
) -> Response:
    """Goes on from each prompt; the choices are numbered prompt by prompt.

    Raises:
        ApiError, InputError: it cannot be.
    """
    caller = caller_of(request)
    adapter = await desk.adapter(asked.model, caller)
    deadline, texts = desk.deadline(), asked.prompts()
    desk.require_room(len(texts) * asked.choices)
    work = prompts.of_texts(adapter, texts, client_of(request))
    tokens = await while_wanted(request, work, deadline, desk.late())
    answers = await desk.hand_in(tokens, adapter, asked, deadline, owner=caller.owner)
    written = [0] * len(answers)  # characters whose tokens were sent, an answer

    def choice(number: int, given: Answer | AnswerPiece) -> CompletionChoice:
        why = given.finish_reason if isinstance(given, Answer) else finish_reason(given)
        logprobs = None
        if asked.rivals is not None:
            logprobs = _logprobs(given.logprobs, written[number])
            written[number] += sum(len(token.text) for token in given.logprobs)
        return {"index": number, "text": given.text, "logprobs": logprobs, "finish_reason": why}

    return await respond(request, asked, answers, _KIND, choice, choice)


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
