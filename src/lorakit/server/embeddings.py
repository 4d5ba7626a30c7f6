"""`POST /v1/embeddings`: what the base or an adapter makes of texts, by the model's pooling."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from lorakit.server.bodies import client_of
from lorakit.server.errors import bad_field
from lorakit.server.keys import caller_of
from lorakit.server.open_answers import Desk
from lorakit.server.payload_parts import WHOLE
from lorakit.server.payloads import Embedded, PooledTexts
from lorakit.server.pooled_answers import at_once, pooled
from lorakit.server.prompt_tokens import Prompts


class EmbeddingRequest(PooledTexts, Embedded):
    """Texts or token ids to embed.

    `dimensions` keeps the first so many numbers, which mean something for models that were trained
    so (Kusupati et al. 2022, arXiv:2205.13147); where embeddings have length 1, these have it too.
    """

    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = None


async def embed(
    request: Request, asked: EmbeddingRequest, desk: Desk, prompts: Prompts
) -> Response:
    """The embedding of each text.

    Raises:
        ApiError, InputError: it cannot be.
    """
    adapter = await desk.adapter(asked.model, caller_of(request))
    deadline, texts = desk.deadline(), asked.inputs()
    if (wanted := asked.dimensions) is not None and wanted > desk.engine.width:
        raise bad_field(f"dimensions: the model has {desk.engine.width}", "dimensions")
    desk.require_room(min(len(texts), at_once(desk)))
    work = prompts.of_texts(adapter, texts, client_of(request), "input", cut=asked)
    made, counts = await pooled(request, asked, adapter, work, desk, deadline)
    data = [
        {
            "object": "embedding",
            "index": number,
            "embedding": _form(one.embedding or (), asked, desk.engine.pooling.normalize),
        }
        for number, one in enumerate(made)
    ]
    usage = {"prompt_tokens": counts["prompt_tokens"], "total_tokens": counts["total_tokens"]}
    return JSONResponse({"object": "list", "data": data, "model": asked.model, "usage": usage})


def _form(values: Sequence[float], asked: EmbeddingRequest, normalize: bool) -> list[float] | str:
    if asked.dimensions is not None:
        values = values[: asked.dimensions]
        length = (math.hypot(*values) or 1.0) if normalize else 1.0
        values = [value / length for value in values]
    if asked.encoding_format == "base64":  # of float32, the least significant byte first
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
    return list(values)
