"""`POST /classify`, as vLLM has it: which of its labels a classifier's adapter gives to texts."""

from __future__ import annotations

import math
import time
import uuid
from typing import ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from lorakit.server.bodies import client_of
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Desk
from lorakit.server.payloads import PooledTexts
from lorakit.server.pooled_answers import at_once, pooled
from lorakit.server.prompt_tokens import Prompts


class ClassifyRequest(PooledTexts):
    """Texts or token ids to be classified."""

    wants: ClassVar[str] = "labels"


async def classify(
    request: Request, asked: ClassifyRequest, desk: Desk, prompts: Prompts
) -> Response:
    """The likeliest label of each text, and the probabilities of all.

    Raises:
        ApiError, InputError: it cannot be.
    """
    adapter = await desk.adapter(asked.model, caller_of(request))
    deadline, texts = desk.deadline(), asked.inputs()
    desk.require_kind(adapter, asked)
    labels = desk.engine.pool.version(adapter).info.labels if adapter is not None else ()
    desk.require_room(min(len(texts), at_once(desk)))
    work = prompts.of_texts(adapter, texts, client_of(request), "input", cut=asked)
    made, usage = await pooled(request, asked, adapter, work, desk, deadline)
    data = []
    for number, one in enumerate(made):
        probs = _softmax(one.scores)
        best = max(range(len(probs)), key=probs.__getitem__)
        found = {"index": number, "label": labels[best], "probs": probs, "num_classes": len(probs)}
        data.append(found)
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


def _softmax(logits: tuple[float, ...]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(value - largest) for value in logits]
    total = sum(weights)
    return [weight / total for weight in weights]
