"""`POST /v1/score` and `POST /v1/rerank`, in vLLM's forms: texts are compared.

A reward model scores a conversation, so the first text is what a user says and the second the
answer to it, in the chat template that it was trained with. Scores are its own, of any size. An
embedding model (a bi-encoder) reads each text by itself, and a score is the cosine of two vectors.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from lorakit.server.bodies import client_of
from lorakit.server.errors import bad_field
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Desk
from lorakit.server.payload_parts import MAX_INPUTS, WHOLE, Payload, Text
from lorakit.server.payloads import Embedded, Pooled
from lorakit.server.pooled_answers import at_once, pooled
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.replies import Usage
from lorakit.server.sampling_fields import Truncated

Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]


class ScoreRequest(Pooled, Truncated):
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


class GivenDocument(Payload):
    """A document as Jina's and Cohere's clients send it."""

    text: Text


class RerankRequest(Pooled, Truncated):
    """A query, and documents to be sorted by how well they answer it."""

    query: Text
    documents: Annotated[
        list[Text | GivenDocument], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
    ]
    top_n: Annotated[int, Field(ge=0, lt=2**31), WHOLE] | None = 0
    return_documents: bool | None = True

    def texts(self) -> list[str]:
        """The documents' texts."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


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
    texts = asked.texts()
    pairs = [(asked.query, text) for text in texts]
    scores, usage = await _scores(request, asked, pairs, desk, prompts)
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    results: list[dict[str, Any]] = []
    for i in order[: asked.top_n or len(order)]:
        shown = {} if asked.return_documents is False else {"document": {"text": texts[i]}}
        results.append({"index": i, **shown, "relevance_score": scores[i]})
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
    asked: ScoreRequest | RerankRequest,
    pairs: list[tuple[str, str]],
    desk: Desk,
    prompts: Prompts,
) -> tuple[list[float], Usage]:
    adapter = await desk.adapter(asked.model, caller_of(request))
    deadline = desk.deadline()
    desk.require_room(min(len(pairs), at_once(desk)))
    if desk.embeds_only(adapter):
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        reading = prompts.of_texts(adapter, texts, client_of(request), "text", cut=asked)
        how = Embedded.model_construct(model=asked.model)
        vectors, usage = await pooled(request, how, adapter, reading, desk, deadline)
        of = {t: one.embedding or () for t, one in zip(texts, vectors, strict=True)}
        return [_cosine(of[first], of[second]) for first, second in pairs], usage
    if asked.truncate_prompt_tokens is not None:
        what = "truncate_prompt_tokens is for embedding models: a conversation is scored whole"
        raise bad_field(what, "truncate_prompt_tokens")
    given: list[Any] = [
        [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        for first, second in pairs
    ]
    desk.require_kind(adapter, asked)
    work = prompts.of_scored(adapter, given, client_of(request))
    made, usage = await pooled(request, asked, adapter, work, desk, deadline)
    return [one.scores[0] for one in made], usage


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    size = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / size if size else 0.0


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given
