"""`POST /v1/score` and `POST /v1/rerank`, in vLLM's, Jina's and Cohere's forms: texts are compared.

A cross-encoder reads a query and a document as one pair of its tokenizer's, and its one label is
the score. A reward model scores a conversation, so the first text is what a user says and the
second the answer to it, in the chat template that it was trained with; scores are its own, of any
size. An embedding model (a bi-encoder) reads each text by itself, and a score is the cosine of two
vectors.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator

from lorakit.engine.pair_tokens import Encoded
from lorakit.server.bodies import client_of
from lorakit.server.classifying import activated
from lorakit.server.errors import bad_field
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Desk
from lorakit.server.payload_parts import MAX_INPUTS, WHOLE, Payload, Text
from lorakit.server.payloads import Classified, Embedded
from lorakit.server.pooled_answers import at_once, pooled
from lorakit.server.prompt_tokens import Prompts
from lorakit.server.replies import Usage
from lorakit.server.sampling_fields import Cutting

Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
Most = Annotated[int, Field(ge=0, lt=2**31), WHOLE]

_BOTH = (
    ("text_1", "text_2"),
    ("data_1", "data_2"),
    ("queries", "documents"),
    ("queries", "items"),
)


class Compared(Classified):
    """What asks how well texts go with others.

    `max_tokens_per_doc` and `max_tokens_per_query` are Cohere's and vLLM's: the most tokens that
    are read of each text, the special ones not counted.
    """

    texts_field: ClassVar[str] = "text_2"

    max_tokens_per_query: Most | None = None
    max_tokens_per_doc: Most | None = None

    @property
    def each(self) -> tuple[int | None, int | None]:
        """The most tokens of a query and of a document; 0 is any number, as vLLM has it."""
        return self.max_tokens_per_query or None, self.max_tokens_per_doc or None


class ScoreRequest(Compared):
    """Texts that are answered, and answers; one text goes with every answer.

    vLLM has several names for the two: `text_1` and `text_2`, `data_1` and `data_2`, `queries` and
    `documents` or `items`.
    """

    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    data_1: str | Texts | None = None
    data_2: str | Texts | None = None
    queries: str | Texts | None = None
    documents: str | Texts | None = None
    items: str | Texts | None = None

    @model_validator(mode="after")
    def _check_lengths(self) -> ScoreRequest:
        first, second = self._both()
        if len(first) not in (1, len(second)):
            one, other = next(names for names in _BOTH if set(names) <= self.model_fields_set)
            raise ValueError(
                f"{one} has {len(first)} texts and {other} {len(second)}: give as many, or one"
            )
        return self

    def pairs(self) -> list[tuple[str, str]]:
        """What is scored, one by one."""
        first, second = self._both()
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))

    def _both(self) -> tuple[list[str], list[str]]:
        names = {name for both in _BOTH for name in both}
        given = {name: own for name in names if (own := getattr(self, name)) is not None}
        for one, other in _BOTH:
            if given.keys() == {one, other}:
                return _listed(given[one]), _listed(given[other])
        told = ", ".join(" and ".join(both) for both in _BOTH)
        raise ValueError(f"give two fields of texts: {told}")


class GivenDocument(Payload):
    """A document as Jina's and Cohere's clients send it."""

    text: str


class RerankRequest(Compared):
    """A query, and documents to be sorted by how well they answer it."""

    texts_field: ClassVar[str] = "documents"

    query: Text
    documents: Annotated[
        list[str | GivenDocument], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
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
    asked: Compared,
    pairs: list[tuple[str, str]],
    desk: Desk,
    prompts: Prompts,
) -> tuple[list[float], Usage]:
    adapter = await desk.adapter(asked.model, caller_of(request))
    deadline = desk.deadline()
    desk.require_room(min(len(pairs), at_once(desk)))
    client, gives = client_of(request), desk.engine.outputs(adapter)
    if gives.kind == "embedding":
        return await _cosines(request, asked, pairs, desk, prompts, deadline)
    desk.require_kind(adapter, asked)
    if gives.pairs:
        work = prompts.of_classified(
            adapter, [*pairs], client, asked.texts_field, asked, asked.each
        )
        made, usage = await pooled(request, asked, adapter, work, desk, deadline)
        return [activated(one.scores, gives, asked)[0] for one in made], usage
    for name in (*Cutting.model_fields, "max_tokens_per_query", "max_tokens_per_doc"):
        if getattr(asked, name):
            raise bad_field(
                f"{name} is not for reward models: a conversation is scored whole", name
            )
    given: list[Any] = [
        [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        for first, second in pairs
    ]
    talks = prompts.of_scored(adapter, given, client)
    made, usage = await pooled(request, asked, adapter, talks, desk, deadline)
    return [one.scores[0] for one in made], usage


async def _cosines(
    request: Request,
    asked: Compared,
    pairs: list[tuple[str, str]],
    desk: Desk,
    prompts: Prompts,
    deadline: float,
) -> tuple[list[float], Usage]:
    """By an embedding model: each text is read once, alone."""
    adapter = await desk.adapter(asked.model, caller_of(request))
    if asked.use_activation is not None:
        what = "use_activation is for cross-encoders: a cosine has no activation"
        raise bad_field(what, "use_activation")
    keys = list(dict.fromkeys(key for pair in pairs for key in zip(pair, asked.each, strict=True)))

    async def reading() -> list[Encoded]:
        read: list[Encoded] = []
        for text, most in keys:
            where = client_of(request), asked.texts_field
            read += await prompts.of_classified(adapter, [(text,)], *where, asked, (most,))
        return read

    how = Embedded.model_construct(model=asked.model)
    vectors, usage = await pooled(request, how, adapter, reading(), desk, deadline)
    found = {key: one.embedding or () for key, one in zip(keys, vectors, strict=True)}
    scores = [_cosine(*(found[key] for key in zip(p, asked.each, strict=True))) for p in pairs]
    return scores, usage


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    size = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / size if size else 0.0


def _listed(given: str | list[str]) -> list[str]:
    return [given] if isinstance(given, str) else given
