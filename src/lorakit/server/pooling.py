"""`POST /pooling`, as vLLM has it: a reward model's scores, or an embedding model's vectors."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lorakit.server.bodies import client_of
from lorakit.server.errors import bad_field
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Desk
from lorakit.server.payloads import Embedded, Pooled, PoolingRequest
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
    if desk.embeds_only(adapter):
        if asked.messages is not None:
            raise bad_field(f"messages: {asked.model} embeds texts: give input", "messages")
        how: Pooled = Embedded.model_construct(model=asked.model)
        given: list[Any] = texts
        work = prompts.of_texts(adapter, given, client_of(request), "input")
    else:
        how, work = asked, prompts.of_scored(adapter, texts, client_of(request))
    made, usage = await pooled(request, how, adapter, work, desk, deadline)
    data = [
        {"index": number, "object": "pooling", "data": [*(one.embedding or one.scores)]}
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
