"""Every route under every spelling of its path: whoever reaches it has what it declares to need."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI
from starlette.responses import PlainTextResponse

from lorakit.server.guarded_routes import GuardedRoute, Level, needs
from lorakit.server.options import ApiKey, ServerOptions
from served import Running, address, all_of, running

LEVELS = {
    "/": Level.ANYONE,
    "/page/{path}": Level.ANYONE,
    "/health": Level.ANYONE,
    "/metrics": Level.API_KEY,
    "/openapi.json": Level.API_KEY,
    "/v1/chat/completions": Level.API_KEY,
    "/v1/completions": Level.API_KEY,
    "/v1/responses": Level.API_KEY,
    "/v1/embeddings": Level.API_KEY,
    "/pooling": Level.API_KEY,
    **dict.fromkeys(("/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank"), Level.API_KEY),
    **dict.fromkeys(("/tokenize", "/detokenize"), Level.API_KEY),
    **dict.fromkeys(("/classify", "/v1/classify"), Level.API_KEY),
    "/v1/models": Level.API_KEY,
    "/v1/models/{model}": Level.API_KEY,
    "/v1/load_lora_adapter": Level.ADMIN_KEY,
    "/v1/unload_lora_adapter": Level.ADMIN_KEY,
}
KEYS = {None: Level.ANYONE, "wrong": Level.ANYONE, "api": Level.API_KEY, "admin": Level.ADMIN_KEY}
REFUSED = {401, 403}


def opens(key: str | None, level: Level) -> bool:
    return KEYS[key] >= level


BODY = json.dumps({"lora_name": "shop", "lora_path": "poet"}).encode()


@pytest.fixture(scope="module")
def guarded(base: Any, root: Any) -> Iterator[Running]:
    options = ServerOptions(port=0, api_keys=(ApiKey("api"),), admin_key="admin", adapter_root=root)
    with running(base, {"shop": root / "shop"}, options, 2) as server:
        yield server


def application(server: Running) -> FastAPI:
    app: Any = server.server.config.app
    assert isinstance(app, FastAPI)
    return app


def spellings(path: str) -> Iterator[str]:
    """`path` as it is, and as someone would write it who looks for a way around."""
    yield path
    for at, letter in enumerate(path):
        encoded = f"%{ord(letter):02x}"
        yield path[:at] + encoded + path[at + 1 :]
        if letter == "/":
            for other in ("//", "/./", "\\", "%5c", "%2F", "%252f", "/x/../", "/%2e%2e/", "/;/"):
                yield path[:at] + other + path[at + 1 :]
    yield "".join(f"%{ord(letter):02X}" for letter in path)
    yield path[0] + f"%25{ord(path[-1]):02x}" + path[1:]
    yield from (path.upper(), path.title(), path.swapcase())
    ends = "%0a %0d %0d%0a %0a%0a %00 %20 %09 %0b %0c %1c %85 %c2%85 %e2%80%a8 %ff %c0%af"
    ends += " / // /. /.. . .. ; ;x=1 ;/ ? ?x=1 %3f %23 # & * ~ %2e /%2e%2e/ .json"
    for end in ends.split():
        yield path + end
    for start in ("/.", "/", "/x/..", "/%2e", "/page/..", "/page/%2e%2e", "/health/..", "/%0a"):
        yield start + path
    for prefix in ("http://localhost", "http://x", "localhost"):  # a target in absolute form
        yield prefix + path


def ask(server: Running, method: str, target: str, key: str | None) -> int:
    """The status of a request whose target is sent as it is; 0 of none."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [] if key is None else [f"Authorization: Bearer {key}"]
    lines += ["Content-Type: application/json", f"Content-Length: {len(BODY)}", "", ""]
    with socket.create_connection(address(server), timeout=10) as sock:
        sock.sendall("\r\n".join(lines).encode("latin-1") + BODY)
        reply = all_of(sock)
    return int(reply.split(None, 2)[1]) if reply else 0


def counted(server: Running) -> dict[tuple[str, str], float]:
    """How many requests there were, by the route that the server matched and the status."""
    text = server.http.get("/metrics", headers={"Authorization": "Bearer api"}).text
    found = {}
    for line in text.splitlines():
        if line.startswith("lorakit_requests_total{"):
            labels, _, number = line.partition("{")[2].rpartition("} ")
            route, status = (part.split('"')[1] for part in labels.split(","))
            found[route, status] = float(number)
    return found


def test_every_route_declares_what_it_needs(guarded: Running) -> None:
    routes = application(guarded).routes
    assert all(isinstance(route, GuardedRoute) for route in routes)
    assert {r.path_format: r.access.level for r in routes if isinstance(r, GuardedRoute)} == LEVELS


@pytest.mark.parametrize("key", KEYS)
def test_no_spelling_of_a_path_reaches_what_the_key_does_not_open(
    guarded: Running, key: str | None
) -> None:
    before = counted(guarded)
    for route in application(guarded).routes:
        assert isinstance(route, GuardedRoute)
        method = min(route.methods or ())
        plain = route.path_format.replace("{path}", "page.css").replace("{model}", "shop")
        if key == "admin" and route.access.level is Level.ADMIN_KEY:
            continue  # it may
        for target in dict.fromkeys(spellings(plain)):
            status = ask(guarded, method, target, key)
            assert status < 500, (method, target)
    for reached, number in counted(guarded).items():
        name, code = reached
        if number == before.get(reached, 0) or name == "/metrics":
            continue
        if not opens(key, LEVELS.get(name, Level.API_KEY)):
            assert int(code) in REFUSED, f"{name} was reached with {key} as the key: {code}"
    assert {name for name, _ in counted(guarded)} <= LEVELS.keys() | {"other"}
    assert guarded.engine.pool.holds("shop")


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "TRACE", "post", "X"])
def test_no_other_method_reaches_more(guarded: Running, method: str) -> None:
    for path, level in LEVELS.items():
        plain = path.replace("{path}", "page.css").replace("{model}", "shop")
        for key in KEYS:
            status = ask(guarded, method, plain, key)
            assert status in ({405} if opens(key, level) else REFUSED), (method, plain, key)


def test_a_route_that_declares_nothing_cannot_be_added(guarded: Running) -> None:
    app = application(guarded)
    before = len(app.routes)

    async def open_to_all() -> PlainTextResponse:
        return PlainTextResponse("in")

    router = APIRouter()
    router.get("/new")(open_to_all)
    both = [*needs(Level.ANYONE), *needs(Level.API_KEY)]
    for add in (
        lambda: app.get("/new")(open_to_all),
        lambda: app.post("/new", dependencies=both)(open_to_all),
        lambda: app.add_api_route("/new", open_to_all),
        lambda: app.add_route("/new", open_to_all),  # type: ignore[arg-type]
        lambda: app.mount("/new", PlainTextResponse("in")),
        lambda: app.include_router(router),
        lambda: app.websocket("/new")(open_to_all),
        lambda: app.router.routes.extend(router.routes),
        lambda: app.router.routes.insert(0, router.routes[0]),
    ):
        with pytest.raises(TypeError, match="declare"):
            add()
    assert len(app.routes) == before
    assert ask(guarded, "GET", "/new", "api") == 404


def test_a_final_newline_is_no_part_of_any_path(guarded: Running) -> None:
    for path in ("/v1/unload_lora_adapter%0A", "/v1/load_lora_adapter%0a", "/v1/completions%0A"):
        assert ask(guarded, "POST", path, "api") == 404
        assert ask(guarded, "POST", path, "admin") == 404
        assert ask(guarded, "POST", path, None) == 401


def test_the_body_of_a_request_without_the_right_key_is_not_read(guarded: Running) -> None:
    for path, key in (
        ("/v1/completions", "wrong"),
        ("/v1/unload_lora_adapter", "api"),
        ("/nowhere", "wrong"),
    ):
        with socket.create_connection(address(guarded), timeout=5) as sock:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            sock.sendall(f"{head}Authorization: Bearer {key}\r\n\r\n".encode())
            assert int(sock.recv(100).split()[1]) in REFUSED
