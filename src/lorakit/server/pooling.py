"""`POST /pooling`, as vLLM has it: a score of a text or conversation, or a text's embedding."""

from __future__ import annotations

import time
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lorakit.engine.outputs import Outputs
from lorakit.engine.pair_tokens import Encoded
from lorakit.server.bodies import client_of
from lorakit.server.errors import bad_field
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Answer, Desk
from lorakit.server.payloads import Classified, Embedded, Pooled, PoolingRequest
from lorakit.server.pooled_answers import at_once, pooled
from lorakit.server.prompt_tokens import Prompts


async def pool(request: Request, asked: PoolingRequest, desk: Desk, prompts: Prompts) -> Response:
    """The score of each text, or of the conversation; the embeddings of texts.

    Raises:
        ApiError, InputError: it cannot be.
    """
    adapter = await desk.adapter(asked.model, caller_of(request))
    deadline, texts = desk.deadline(), asked.inputs()
    desk.require_room(min(len(texts), at_once(desk)))
    gives, client = desk.engine.outputs(adapter), client_of(request)
    if (gives.kind == "embedding" or gives.pairs) and asked.messages is not None:
        raise bad_field(f"messages: {asked.model} reads texts: give input", "messages")
    how: Pooled = asked
    work: Coroutine[Any, Any, Sequence[list[int] | Encoded]]
    if gives.kind == "embedding":
        how = Embedded.model_construct(model=asked.model)
        work = prompts.of_texts(adapter, asked.texts(), client, "input")
    elif gives.pairs:
        desk.require_kind(adapter, asked)
        given = [(one,) if isinstance(one, str) else one for one in asked.texts()]
        whole = Classified.model_construct(model=asked.model)
        work = prompts.of_classified(adapter, given, client, "input", whole)
    else:
        work = prompts.of_scored(adapter, texts, client)
    made, usage = await pooled(request, how, adapter, work, desk, deadline)
    data = [
        {"index": number, "object": "pooling", "data": _numbers(one, gives)}
        for number, one in enumerate(made)
    ]
    return JSONResponse(
        {
            "id": f"pool-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": asked.model,
            "data": data,
            "usage": usage,
        }
    )


def _numbers(one: Answer, gives: Outputs) -> list[float]:
    return [*one.embedding] if one.embedding is not None else gives.activation(one.scores)
