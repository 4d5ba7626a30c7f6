"""How much may be asked: every limit at its edge and beyond, and clients that are slow."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from matrix import few
from served import Running, address, all_of, closes, head, in_background, refused, until

TEXT = {"model": "shop", "prompt": "a", "max_tokens": 2}
TEXTS = "/v1/completions"


# --- bodies -------------------------------------------------------------------------------------


def _padded(size: int) -> bytes:
    body = json.dumps(TEXT).encode()
    return body + b" " * (size - len(body))


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_taken_up_to_its_limit(serve: Any, chunked: bool) -> None:
    server = serve({"body_bytes": 100_000})

    def post(size: int) -> httpx.Response:
        body = _padded(size)
        parts: Iterator[bytes] = (body[i : i + 5000] for i in range(0, size, 5000))
        content = parts if chunked else body
        response: httpx.Response = server.http.post(TEXTS, content=content, headers=JSON)
        return response

    assert post(100_000).status_code == 200
    for size in (100_001, 250_000, 400_000):
        error = refused(post(size), 413)
        assert "100000 bytes" in error["message"]
    assert server.complete().status_code == 200


def test_a_body_far_above_the_limit_is_refused_by_its_length_alone(serve: Any) -> None:
    server = serve({"body_bytes": 1000})
    with socket.create_connection(address(server), timeout=60) as sock:
        sock.sendall(head(10**12))
        assert b" 413 " in sock.recv(200)
        assert closes(sock)


def test_an_endless_chunked_body_is_cut_off(serve: Any) -> None:
    server = serve({"body_bytes": 1000})
    with socket.create_connection(address(server), timeout=60) as sock:
        opening = f"POST {TEXTS} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(opening.encode())
        chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
        with pytest.raises(OSError, match=r"reset|Broken pipe|closed"):  # noqa: PT012
            for _ in range(10_000):
                sock.sendall(chunk)
    assert server.complete().status_code == 200


def test_a_body_that_does_not_come_times_out(serve: Any) -> None:
    server = serve({"header_seconds": 0.5})
    with socket.create_connection(address(server), timeout=60) as sock:
        sock.sendall(head(100) + b"{")
        assert b" 408 " in sock.recv(200)
        assert closes(sock)


# --- heads and connections ----------------------------------------------------------------------


def test_a_head_that_comes_byte_by_byte_is_left(serve: Any) -> None:
    server = serve({"header_seconds": 0.5})
    with socket.create_connection(address(server), timeout=60) as sock:
        start = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT012
            for byte in b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 100:
                sock.sendall(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - start < 11  # all of it takes 12 s
    silent = socket.create_connection(address(server), timeout=60)
    assert closes(silent)


def test_a_connection_that_answers_slowly_is_not_taken_for_a_slow_head(serve: Any) -> None:
    server = serve({"header_seconds": 0.3})
    started = time.monotonic()
    reply = server.complete(max_tokens=800)
    assert time.monotonic() - started > 0.35, "too fast to prove anything"
    assert reply.json()["usage"]["completion_tokens"] == 800


def test_a_head_that_is_too_long_is_a_bad_request(served: Running) -> None:
    with socket.create_connection(address(served), timeout=60) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000)
        reply = all_of(sock)
    assert b" 400 " in reply.split(b"\r\n")[0]
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET\r\n\r\n"])
def test_what_is_no_http_gets_an_error_in_the_same_form(served: Running, junk: bytes) -> None:
    with socket.create_connection(address(served), timeout=60) as sock:
        sock.sendall(junk)
        reply = all_of(sock)
    assert b" 400 " in reply.split(b"\r\n")[0]
    assert "error" in json.loads(reply.partition(b"\r\n\r\n")[2])


def test_connections_beyond_the_limit_are_told_so(serve: Any) -> None:
    server = serve({"connections": 3})
    assert server.complete().status_code == 200  # the test's own connection
    idle = [socket.create_connection(address(server), timeout=60) for _ in range(2)]
    until(lambda: _connected(server) == 3)
    with httpx.Client(base_url=server.url) as late:
        error = refused(late.get("/health"), 503)
        assert "too many connections" in error["message"]
    for sock in idle:
        sock.close()
    until(lambda: _connected(server) <= 1)
    with httpx.Client(base_url=server.url) as late:
        assert late.get("/health").status_code == 200


# --- how much at once ---------------------------------------------------------------------------


def test_answers_beyond_rows_and_queue_are_refused_with_when_to_retry(serve: Any) -> None:
    server = serve({"waiting": 1}, max_rows=2)
    first = in_background(server, n=2, max_tokens=600)
    until(lambda: server.engine.running() == 2)
    second = in_background(server, max_tokens=600)
    until(lambda: server.engine.waiting() == 1)
    response = server.complete()
    error = refused(response, 429)
    assert error["type"] == "rate_limit_error"
    assert int(response.headers["Retry-After"]) >= 1
    assert refused(server.complete(n=4), 400)["param"] == "n"
    assert first() == second() == 200
    assert server.complete(n=3).status_code == 200


def test_requests_beyond_the_limit_are_refused_but_for_health_figures_and_the_page(
    serve: Any,
) -> None:
    server = serve({"requests": 1})
    first = in_background(server, max_tokens=600)
    until(lambda: server.engine.running() == 1)
    response = server.http.get("/v1/models")
    assert "no more are taken at once" in refused(response, 429)["message"]
    assert "Retry-After" in response.headers
    assert server.http.get("/health").status_code == 200
    assert server.figure("lorakit_answers_running") == 1
    for path in ("/", "/page/page.js"):
        assert server.http.get(path).status_code == 200
    assert first() == 200


def test_an_answer_is_cut_where_its_time_ends(serve: Any) -> None:
    server = serve({"request_seconds": 0.5})
    choice = server.complete(max_tokens=4000)
    assert choice.json()["choices"][0]["finish_reason"] == "length"
    assert 0 < choice.json()["usage"]["completion_tokens"] < 4000
    streamed = server.openai.completions.create(
        model="shop", prompt="a", max_tokens=4000, temperature=0, stream=True
    )
    assert [c.choices[0].finish_reason for c in streamed][-1] == "length"
    until(lambda: server.engine.running() == 0)


def test_what_waits_until_its_time_ends_is_unavailable(serve: Any) -> None:
    server = serve({"request_seconds": 1.0}, max_rows=1)
    first = in_background(server, max_tokens=4000)
    until(lambda: server.engine.running() == 1)
    time.sleep(0.3)
    started = time.monotonic()
    response = server.complete(n=3, max_tokens=4000)
    assert "no row became free" in refused(response, 503)["message"]
    assert time.monotonic() - started < 20
    assert first() == 200


def test_a_client_that_does_not_read_is_left(serve: Any) -> None:
    server = serve({"write_seconds": 0.5})
    body = {"model": "shop", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4000}
    content = json.dumps({**body, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(address(server))
        sock.sendall(head(len(content), "/v1/chat/completions") + content)
        until(lambda: server.engine.running() == 1)
        started = time.monotonic()
        until(lambda: server.engine.running() == 0)
        assert time.monotonic() - started < 30
    assert server.figure("lorakit_generated_tokens_total") < 4000


def test_a_connection_whose_last_bytes_nobody_takes_is_closed(serve: Any) -> None:
    server = serve({"write_seconds": 0.5})
    for listening in server.server.servers[0].sockets:  # connections get it from there
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    # More than the system takes, and too little for the server to wait before it closes.
    fields = {"max_tokens": 150, "logprobs": 20, "temperature": 0}
    content = json.dumps({**TEXT, **fields}).encode()
    closing = head(len(content)).replace(
        b"Host: localhost", b"Host: localhost\r\nConnection: close"
    )
    with ExitStack() as stack:
        for _ in range(4):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            sock.connect(address(server))
            sock.sendall(closing + content)
        until(lambda: _connected(server) == 4)
        until(lambda: _connected(server) == 0)


def _connected(server: Running) -> int:
    return len(server.server.server_state.connections)


@pytest.mark.parametrize("number", few([50, 200], 50))
def test_many_connections_at_once_are_all_answered(served: Running, number: int) -> None:
    async def ask() -> list[int]:
        limits = httpx.Limits(max_connections=number)
        async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits) as client:
            bodies = [{**TEXT, "prompt": f"number {i}"} for i in range(number)]
            replies = await asyncio.gather(*(client.post(TEXTS, json=body) for body in bodies))
        return [reply.status_code for reply in replies]

    assert asyncio.run(ask()) == [200] * number
    until(lambda: served.engine.running() + served.engine.waiting() == 0)
