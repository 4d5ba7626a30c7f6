"""`POST /pooling`, as vLLM has it: what a reward model gives to texts or to a conversation."""

from __future__ import annotations

import time
import uuid

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lorakit.server.bodies import client_of
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Desk
from lorakit.server.payloads import PoolingRequest
from lorakit.server.pooled_answers import pooled
from lorakit.server.prompt_tokens import Prompts


async def pool(request: Request, asked: PoolingRequest, desk: Desk, prompts: Prompts) -> Response:
    """The score of each text, or of the conversation.

    Raises:
        ApiError, InputError: it cannot be.
    """
    adapter = await desk.adapter(asked.model, caller_of(request))
    deadline, texts = desk.deadline(), asked.inputs()
    desk.require_room(len(texts))
    work = prompts.of_scored(adapter, texts, client_of(request))
    made, answers = await pooled(request, asked, adapter, work, desk, deadline)
    data = [
        {"index": number, "object": "pooling", "data": [*one.scores]}
        for number, one in enumerate(made)
    ]
    return JSONResponse(
        {
            "id": f"pool-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": asked.model,
            "data": data,
            "usage": answers.usage,
        }
    )
