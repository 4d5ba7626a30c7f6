"""`POST /v1/score` and `POST /v1/rerank`, in vLLM's forms: a reward model compares answers.

A reward model scores a conversation, so the first text is what a user says and the second the
answer to it, in the chat template that it was trained with. Scores are its own, of any size.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from lorakit.server.bodies import client_of
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Desk
from lorakit.server.payload_parts import MAX_CHOICES, WHOLE, Text
from lorakit.server.payloads import Pooled
from lorakit.server.pooled_answers import pooled
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.replies import Usage

Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]


class ScoreRequest(Pooled):
    """Texts that are answered, and answers; one text goes with every answer."""

    text_1: Text | Texts
    text_2: Text | Texts

    @model_validator(mode="after")
    def _check_lengths(self) -> ScoreRequest:
        first, second = _listed(self.text_1), _listed(self.text_2)
        if len(first) not in (1, len(second)):
            raise ValueError(
                f"text_1 has {len(first)} texts and text_2 {len(second)}: give as many"
            )
        return self

    def pairs(self) -> list[tuple[str, str]]:
        """What is scored, one by one."""
        first, second = _listed(self.text_1), _listed(self.text_2)
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


class RerankRequest(Pooled):
    """A query, and documents to be sorted by how well they answer it."""

    query: Text
    documents: Texts
    top_n: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = 0


async def score(request: Request, asked: ScoreRequest, desk: Desk, prompts: Prompts) -> Response:
    """The score of each pair.

    Raises:
        ApiError, InputError: it cannot be.
    """
    scores, usage = await _scores(request, asked, asked.pairs(), desk, prompts)
    data = [
        {"index": number, "object": "score", "score": value} for number, value in enumerate(scores)
    ]
    return JSONResponse(
        {
            "id": f"score-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": asked.model,
            "data": data,
            "usage": usage,
        }
    )


async def rerank(request: Request, asked: RerankRequest, desk: Desk, prompts: Prompts) -> Response:
    """The documents, the best first.

    Raises:
        ApiError, InputError: it cannot be.
    """
    pairs = [(asked.query, document) for document in asked.documents]
    scores, usage = await _scores(request, asked, pairs, desk, prompts)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    results = [
        {"index": i, "document": {"text": asked.documents[i]}, "relevance_score": scores[i]}
        for i in order[: asked.top_n or len(order)]
    ]
    return JSONResponse(
        {
            "id": f"rerank-{uuid.uuid4().hex}",
            "model": asked.model,
            "usage": usage,
            "results": results,
        }
    )


async def _scores(
    request: Request,
    asked: Pooled,
    pairs: list[tuple[str, str]],
    desk: Desk,
    prompts: Prompts,
) -> tuple[list[float], Usage]:
    adapter = await desk.adapter(asked.model, caller_of(request))
    deadline = desk.deadline()
    desk.require_room(len(pairs))
    given: list[Any] = [
        [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        for first, second in pairs
    ]
    desk.require_kind(adapter, asked)
    work = prompts.of_scored(adapter, given, client_of(request))
    made, answers = await pooled(request, asked, adapter, work, desk, deadline)
    return [one.scores[0] for one in made], answers.usage


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given
