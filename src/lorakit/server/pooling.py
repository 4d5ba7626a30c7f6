"""`POST /pooling`, as vLLM has it: what a reward model gives to texts or to a conversation."""

from __future__ import annotations

import time
import uuid

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lorakit.server.bodies import client_of
from lorakit.server.event_streams import while_wanted
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Desk
from lorakit.server.payloads import PoolingRequest
from lorakit.server.prompt_tokens import Prompts


async def pool(request: Request, asked: PoolingRequest, desk: Desk, prompts: Prompts) -> Response:
    """The score of each text, or of the conversation.

    Raises:
        ApiError, InputError: it cannot be.
    """
    caller = caller_of(request)
    adapter = await desk.adapter(asked.model, caller)
    deadline, texts = desk.deadline(), asked.inputs()
    desk.require_room(len(texts))
    work = prompts.of_scored(adapter, texts, client_of(request))
    tokens = await while_wanted(request, work, deadline, desk.late())
    answers = await desk.hand_in(tokens, adapter, asked, deadline, owner=caller.owner)
    try:
        made = await while_wanted(request, answers.whole())
    finally:
        answers.close()
    data = [
        {"index": number, "object": "pooling", "data": [one.score]}
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
