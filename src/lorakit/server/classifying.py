"""`POST /classify`, as vLLM has it: which of its labels a classifier gives to texts.

A text of a classifier that reads pairs (premise and hypothesis) is a list of two, as in
text-embeddings-inference's `/predict`.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from lorakit.engine.outputs import Outputs
from lorakit.models.score_activations import identity
from lorakit.server.bodies import client_of
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Desk
from lorakit.server.payload_parts import MAX_INPUTS, Text, TokenIds
from lorakit.server.payloads import Classified
from lorakit.server.pooled_answers import at_once, pooled
from lorakit.server.prompt_tokens import Prompts

Pair = Annotated[list[Text], Field(min_length=2, max_length=2)]


class ClassifyRequest(Classified):
    """Texts, pairs of texts or token ids to be classified."""

    wants: ClassVar[str] = "labels"

    input: (
        Text
        | TokenIds
        | Annotated[
            list[Text | TokenIds | Pair], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)
        ]
    )

    def inputs(self) -> list[tuple[str, ...] | list[int]]:
        """What is classified, one by one: a text, a pair, or tokens."""
        if isinstance(self.input, str):
            return [(self.input,)]
        if isinstance(self.input[0], int):
            return [self.input]
        return [_texts(one) for one in self.input]


def _texts(one: str | list[int] | list[str]) -> tuple[str, ...] | list[int]:
    if isinstance(one, str):
        return (one,)
    return one if isinstance(one[0], int) else tuple(one)


async def classify(
    request: Request, asked: ClassifyRequest, desk: Desk, prompts: Prompts
) -> Response:
    """The likeliest label of each text, and the probabilities of all.

    Raises:
        ApiError, InputError: it cannot be.
    """
    adapter = await desk.adapter(asked.model, caller_of(request))
    deadline, given = desk.deadline(), asked.inputs()
    desk.require_kind(adapter, asked)
    gives = desk.engine.outputs(adapter)
    desk.require_room(min(len(given), at_once(desk)))
    work = prompts.of_classified(adapter, given, client_of(request), "input", asked)
    made, usage = await pooled(request, asked, adapter, work, desk, deadline)
    data = []
    for number, one in enumerate(made):
        probs = activated(one.scores, gives, asked)
        best = max(range(len(probs)), key=probs.__getitem__)
        label = gives.labels[best]
        data.append({"index": number, "label": label, "probs": probs, "num_classes": len(probs)})
    return JSONResponse(
        {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": asked.model,
            "data": data,
            "usage": usage,
        }
    )


def activated(logits: tuple[float, ...], gives: Outputs, asked: Classified) -> list[float]:
    """What a request gets of a classifier's logits."""
    function = identity if asked.use_activation is False else gives.activation
    return function(logits)
