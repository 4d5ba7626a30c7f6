"""`POST /v1/completions`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lorakit.engine.requests import AnswerPiece, ChosenToken
from lorakit.server.bodies import client_of
from lorakit.server.event_streams import Kind, respond, while_wanted
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Answer, Desk, finish_reason
from lorakit.server.payloads import CompletionRequest
from lorakit.server.prompt_logprobs import prompt_logprobs
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.replies import (
    CompletionChoice,
    CompletionLogprobs,
    PromptLogprobs,
    Usage,
    finite,
)

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
    desk.require_kind(adapter, asked)
    deadline, texts = desk.deadline(), asked.prompts()
    desk.require_room(len(texts) * asked.choices)
    special = asked.add_special_tokens is not False
    work = prompts.of_texts(adapter, texts, client_of(request), special=special, cut=asked)
    tokens = await while_wanted(request, work, deadline, desk.late())
    tokenizer = desk.engine.tokenizer_of(adapter)
    echoes: list[Echo] = []
    if asked.echo:
        reading = _echoes(asked, tokens, texts, tokenizer, desk, adapter, caller.owner)
        echoes = await while_wanted(request, reading, deadline, desk.late())
    scores: list[PromptLogprobs] = []
    if (rivals := asked.prompt_logprobs) is not None:
        for one in tokens:
            scored = prompt_logprobs(desk.engine, one, adapter, rivals, caller.owner)
            scores.append(await while_wanted(request, scored, deadline, desk.late()))
    if asked.max_tokens == 0:
        return _echoed(asked, echoes, scores, sum(map(len, tokens)))
    answers = await desk.hand_in(tokens, adapter, asked, deadline, owner=caller.owner)
    written = [0] * len(answers)  # characters that were sent, an answer
    begun = [False] * len(answers)

    def choice(number: int, given: Answer | AnswerPiece) -> CompletionChoice:
        why = given.finish_reason if isinstance(given, Answer) else finish_reason(given)
        text, logprobs, echo = given.text, None, Echo()
        if echoes and not begun[number]:
            echo, begun[number] = echoes[number // asked.kept], True
        if asked.rivals is not None:
            logprobs = _logprobs(given.logprobs, written[number] + len(echo.text))
            written[number] += len(echo.text) + sum(len(one.text) for one in given.logprobs)
            if echo.logprobs is not None:
                logprobs = _joined(echo.logprobs, logprobs)
        made: CompletionChoice = {
            "index": number,
            "text": echo.text + text,
            "logprobs": logprobs,
            "finish_reason": why,
        }
        if scores:
            made["prompt_logprobs"] = scores[number // asked.kept]
        return made

    def best(made: list[Answer]) -> list[Answer]:
        size, kept = asked.choices, list[Answer]()
        for at in range(0, len(made), size):
            kept += sorted(made[at : at + size], key=_likelihood, reverse=True)[: asked.kept]
        return kept

    return await respond(
        request, asked, answers, _KIND, choice, lambda *one: [choice(*one)], best=best
    )


@dataclass(frozen=True)
class Echo:
    """A prompt as it stands before its answer."""

    text: str = ""
    logprobs: CompletionLogprobs | None = None


async def _echoes(
    asked: CompletionRequest,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[str | list[int]],
    tokenizer: Any,
    desk: Desk,
    adapter: str | None,
    owner: str,
) -> list[Echo]:
    """The prompts, with the log-probabilities of their tokens where these are asked for."""
    made = []
    for tokens, given in zip(prompts, texts, strict=True):
        cut = asked.truncate_prompt_tokens is not None or not isinstance(given, str)
        text = str(tokenizer.decode(tokens)) if cut else str(given)
        if asked.rivals is None:
            made.append(Echo(text))
            continue
        scored = desk.engine.score_prompt(tokens, adapter, asked.rivals, owner)
        scores = await asyncio.wrap_future(scored)
        names = [str(tokenizer.decode([token])) for token in tokens]
        offsets, offset = [], 0
        for name in names:
            offsets.append(offset)
            offset += len(name)
        tops: list[dict[str, float] | None] = [None]
        tops += [
            {str(tokenizer.decode([token])): finite(value) for token, value in top}
            for top in scores.rivals[1:]
        ]
        logprobs: CompletionLogprobs = {
            "tokens": names,
            "token_logprobs": [None, *map(finite, scores.logprobs[1:])],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
        made.append(Echo(text, logprobs))
    return made


def _echoed(
    asked: CompletionRequest,
    echoes: Sequence[Echo],
    scores: Sequence[PromptLogprobs],
    tokens: int,
) -> Response:
    """Prompts alone, nothing behind them."""
    choices: list[CompletionChoice] = []
    for number, echo in enumerate(echoes):
        for _ in range(asked.kept):
            index = len(choices)
            said: CompletionChoice = {
                "index": index,
                "text": echo.text,
                "logprobs": echo.logprobs,
                "finish_reason": "length",
            }
            if scores:
                said["prompt_logprobs"] = scores[number]
            choices.append(said)
    usage: Usage = {
        "prompt_tokens": tokens,
        "completion_tokens": 0,
        "total_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    return JSONResponse(
        {
            "id": f"{_KIND.prefix}-{uuid.uuid4().hex}",
            "object": _KIND.whole,
            "created": int(time.time()),
            "model": asked.model,
            "choices": choices,
            "usage": usage,
        }
    )


def _likelihood(answer: Answer) -> float:
    """The mean log-probability of an answer's tokens."""
    values = [token.logprob for token in answer.logprobs]
    return sum(values) / max(len(values), 1)


def _joined(first: CompletionLogprobs, then: CompletionLogprobs) -> CompletionLogprobs:
    return {
        "tokens": first["tokens"] + then["tokens"],
        "token_logprobs": first["token_logprobs"] + then["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + then["top_logprobs"],
        "text_offset": first["text_offset"] + then["text_offset"],
    }


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
