"""The pages: files of the package, which a browser may run nothing beside."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from lorakit.server.guarded_routes import Level, needs

FOLDER = Path(__file__).parent / "static"

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # a new version of the package shows at once
}

_LINK = '<a id="to-training" href="training"'


def install(app: FastAPI, training: bool = False) -> None:
    """Has `app` serve the pages: index.html at `/`, all files below `/page/`.

    Args:
        training: whether training.html is at `/training`, and the page at `/` has a link to it.
    """
    files = StaticFiles(directory=FOLDER)
    names = frozenset(file.name for file in FOLDER.iterdir() if file.is_file())
    anyone = needs(Level.ANYONE, when_busy=True)  # a busy server's page says that it is busy

    async def sent(name: str, scope: Scope) -> Response:
        if name not in names:
            raise HTTPException(404)
        response = await files.get_response(name, scope)
        response.headers.update(HEADERS)
        return response

    if training:
        whole = (FOLDER / "index.html").read_text(encoding="utf-8")
        linked = whole.replace(f"{_LINK} hidden>", f"{_LINK}>")

        @app.get("/", include_in_schema=False, dependencies=anyone)
        async def index_with_link() -> Response:
            return HTMLResponse(linked, headers=HEADERS)

        @app.get("/training", include_in_schema=False, dependencies=anyone)
        async def of_training(request: Request) -> Response:
            return await sent("training.html", request.scope)

    else:

        @app.get("/", include_in_schema=False, dependencies=anyone)
        async def index(request: Request) -> Response:
            return await sent("index.html", request.scope)

    @app.get("/page/{path:path}", include_in_schema=False, dependencies=anyone)
    async def file(path: str, request: Request) -> Response:
        return await sent(path, request.scope)
