"""A server that runs in a thread, for tests, over any base and adapters."""

import faulthandler
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.server.options import ServerOptions
from lorakit.server.run import DrainingServer, listen, make_server


class Running:
    """A server that runs, and what a test asks it with."""

    def __init__(self, server: DrainingServer, engine: Engine, url: str) -> None:
        self.server, self.engine, self.url = server, engine, url
        self.http = httpx.Client(base_url=url, timeout=60)
        self.openai = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def complete(self, **fields: Any) -> httpx.Response:
        body = {"model": "shop", "prompt": "hello", "max_tokens": 4, "temperature": 0, **fields}
        return self.post("/v1/completions", body)

    def figure(self, name: str) -> float:
        """The sum of a figure's samples."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextmanager
def running(
    base: Path, adapters: Mapping[str, Path], options: ServerOptions, max_rows: int
) -> Iterator[Running]:
    engine = open_engine(str(base), adapters, dtype="float32", max_rows=max_rows, embeds=True)
    try:
        with serving(engine, options) as server:
            yield server
    finally:
        engine.close()


@contextmanager
def serving(engine: Engine, options: ServerOptions) -> Iterator[Running]:
    """A server over an engine that stays open."""
    addresses: list[str] = []
    started = threading.Event()

    def note(address: str) -> None:
        addresses.append(address)
        started.set()

    with listen(options.host, options.port) as sock:
        server = make_server(engine, options, note)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            assert started.wait(60)
            yield Running(server, engine, addresses[0])
        finally:
            server.should_exit = True
            thread.join(120)
            if thread.is_alive():
                faulthandler.dump_traceback(sys.__stderr__)  # what it waits for
    assert not thread.is_alive()


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response that must be in OpenAI's form, whole, with this status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    reply = json.loads(response.content.decode())
    assert set(reply) == {"error"}
    error: dict[str, Any] = reply["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1200
    return error


def address(server: Running) -> tuple[str, int]:
    """Host and port, for a socket."""
    url = server.http.base_url
    return url.host, url.port or 80


def head(length: int, path: str = "/v1/completions") -> bytes:
    """The head of a request whose body of JSON has this length."""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()


def all_of(sock: socket.socket) -> bytes:
    """Everything until the other side closes."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def closes(sock: socket.socket) -> bool:
    """Whether the other side closes the connection, with or without a reset."""
    try:
        all_of(sock)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def in_background(server: Running, **fields: Any) -> Callable[[], int]:
    """Starts a completion; calling the result waits for its status."""
    statuses: list[int] = []
    body = {"model": "shop", "prompt": "a", "max_tokens": 2, "temperature": 0, **fields}

    def ask() -> None:
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, verify=False)
        statuses.append(reply.status_code)

    thread = threading.Thread(target=ask)
    thread.start()

    def status() -> int:
        thread.join(60)
        return statuses[0]

    return status


def until(reached: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for something, and fails when it does not come."""
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)
