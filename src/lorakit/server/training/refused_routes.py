"""Routes of the SDK that are not offered: each is refused by its name, at once and for good.

The status is 400, which no client repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from lorakit.server.errors import ApiError
from lorakit.server.training.requests import add_route

REFUSED = {
    ("POST", "copy_weights"): "load the checkpoint into a new model, and save that",
    ("POST", "create_custom_loss"): "forward_backward_custom computes the loss in the client",
    ("POST", "sessions/search"): "GET sessions lists the sessions of a key",
    ("PUT", "sessions/{session_id}/project"): "there are no projects: a key is a tenant",
    ("GET", "sessions/{session_id}/trace_export"): "the losses of a run are at /training",
    ("GET", "audit"): "the server's log tells who does what",
    ("GET", "billing/usage/events"): "nothing is billed; /metrics has the tokens of each key",
    ("POST", "auth/token"): "send the API key itself",
    ("GET", "auth/apikey/me"): "an API key has no user",
}
"""What is refused, and what to do instead."""


def add_refused_routes(app: FastAPI) -> None:
    """Adds them all."""
    for (method, path), instead in REFUSED.items():
        add_route(app, method, path, _refusing(path, instead))


def _refusing(path: str, instead: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def refuse(request: Request) -> Response:
        raise ApiError(400, f"{path} is not offered here: {instead}", code="unsupported")

    return refuse
