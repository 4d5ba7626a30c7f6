"""What the training routes have in common: reading a request, and adding a route."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import ValidationError

from lorakit.errors import InputError
from lorakit.server.errors import ApiError
from lorakit.server.guarded_routes import Level, needs
from lorakit.server.training import messages as m

PREFIX = "/api/v1"
_PAGE = 20
_LARGEST_PAGE = 1000

Asked = TypeVar("Asked", bound=m.Message)
T = TypeVar("T")


def add_route(
    app: FastAPI,
    method: str,
    path: str,
    handle: Callable[[Request], Any],
    level: Level = Level.API_KEY,
    *,
    when_ending: bool = False,
    when_busy: bool = False,
) -> None:
    """Adds a route below `PREFIX`, for whom `level` says."""
    app.add_api_route(
        f"{PREFIX}/{path}",
        handle,
        methods=[method],
        dependencies=needs(level, when_ending=when_ending, when_busy=when_busy),
        response_model=None,
        include_in_schema=False,
    )


async def read(kind: type[Asked], request: Request) -> Asked:
    """The body.

    Raises:
        ApiError: 422, it is not of this kind.
    """
    try:
        return kind.model_validate(await request.json())
    except ValidationError as error:
        raise ApiError(422, shown(error)) from error


def shown(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def found(find: Callable[[], T]) -> T:
    """What `find` finds.

    Raises:
        ApiError: 404, it does not.
    """
    try:
        return find()
    except InputError as error:
        raise ApiError(404, str(error)) from error


async def awaited(work: Coroutine[Any, Any, T]) -> T:
    """As `found`, of what takes its time."""
    try:
        return await work
    except InputError as error:
        raise ApiError(404, str(error)) from error


def page(every: list[T], request: Request) -> tuple[list[T], dict[str, int]]:
    """As much of a list as the request asks for, and where that lies in it."""
    limit, offset = (
        int(value) if (value := request.query_params.get(name, "")).isdigit() else default
        for name, default in (("limit", _PAGE), ("offset", 0))
    )
    limit = min(limit, _LARGEST_PAGE)
    cursor = {"offset": offset, "limit": limit, "total_count": len(every)}
    return every[offset : offset + limit], cursor
