"""Clients that mean harm, beside one that asks: a thousand connections, drips, silence, junk."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest

from matrix import few
from served import Running, address, all_of, closes, head, refused, until

BODY = json.dumps({"model": "shop", "prompt": "a", "max_tokens": 2}).encode()
CHATS = "/v1/chat/completions"
HALF_A_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le"


@contextmanager
def connections(server: Running, number: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(address(server), timeout=60))
            for _ in range(number)
        ]


MANY = pytest.mark.parametrize("number", few([100, 1000], 100))


@MANY
def test_many_connections_that_are_silent_or_halfway_let_others_be_answered(
    serve: Any, number: int
) -> None:
    server = serve({"header_seconds": 3})
    with connections(server, number) as sockets:
        for place, sock in enumerate(sockets):
            sock.sendall((b"", HALF_A_HEAD, head(100) + b"{", b"GET /v1/models HT")[place % 4])
        with httpx.Client(base_url=server.url, timeout=60) as other:
            body = {"model": "shop", "prompt": "a", "max_tokens": 4}
            for _ in range(5):
                assert other.post("/v1/completions", json=body).status_code == 200
                assert other.get("/health").status_code == 200
        assert all(closes(sock) for sock in sockets)
    until(lambda: server.server.server_state.connections == set())


@MANY
def test_many_connections_that_all_ask_are_all_answered(serve: Any, number: int) -> None:
    server = serve({"requests": 1000, "waiting": 1000}, max_rows=16)
    request = head(len(BODY)).replace(b"Host", b"Connection: close\r\nHost") + BODY
    with connections(server, number) as sockets:
        for sock in sockets:
            sock.settimeout(60)
            sock.sendall(request)
        replies = [all_of(sock) for sock in sockets]
    assert {reply.split(b"\r\n")[0] for reply in replies} == {b"HTTP/1.1 200 OK"}
    until(lambda: server.engine.running() + server.engine.waiting() == 0)


@MANY
def test_many_clients_that_leave_at_once_leave_nothing_behind(serve: Any, number: int) -> None:
    server = serve({"requests": 2000, "waiting": 1000}, max_rows=4)
    long = json.dumps({"model": "shop", "prompt": "a", "max_tokens": 4000}).encode()
    with connections(server, number) as sockets:
        for sock in sockets:
            sock.sendall(head(len(long)) + long)
        until(lambda: server.engine.running() == 4)
    until(lambda: server.engine.running() + server.engine.waiting() == 0)
    assert server.complete(n=4).status_code == 200, "their places are still taken"
    until(lambda: not server.server.server_state.tasks)


def test_a_body_that_comes_byte_by_byte_is_left(serve: Any) -> None:
    server = serve({"header_seconds": 0.5})
    with socket.create_connection(address(server), timeout=60) as sock:
        sock.sendall(head(10_000) + b'{"model": "')
        started = time.monotonic()
        with pytest.raises(OSError):  # noqa: PT012
            while time.monotonic() < started + 60:
                sock.sendall(b"a")
                time.sleep(0.02)
                if b" 408 " in _what_came(sock):
                    raise ConnectionResetError
        assert time.monotonic() - started < 30


def _what_came(sock: socket.socket) -> bytes:
    sock.setblocking(False)
    try:
        return sock.recv(1000)
    except BlockingIOError:
        return b""
    finally:
        sock.settimeout(60)


def test_many_clients_that_do_not_read_are_left_and_hold_up_no_other(serve: Any) -> None:
    server = serve({"write_seconds": 0.5}, max_rows=8)
    asked = {"model": "shop", "prompt": "a", "max_tokens": 4000, "stream": True, "logprobs": 20}
    content = json.dumps(asked).encode()
    with ExitStack() as stack:
        for _ in range(3):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(address(server))
            sock.sendall(head(len(content)) + content)
        until(lambda: server.engine.running() == 3)
        assert server.complete(max_tokens=20).status_code == 200
        until(lambda: server.engine.running() == 0)
    assert server.figure("lorakit_generated_tokens_total") < 3 * 4000


def test_requests_in_one_breath_are_answered_in_turn(served: Running) -> None:
    get = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = get.replace(b"Host", b"Connection: close\r\nHost")
    with socket.create_connection(address(served), timeout=60) as sock:
        sock.sendall(get + head(len(BODY)) + BODY + get * 50 + last)
        reply = all_of(sock)
    assert reply.count(b"HTTP/1.1 200 OK") == 53
    assert reply.index(b"text_completion") < reply.rindex(b'"object":"list"')


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nContent-Length: 50\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: five\r\n",
        b"Content-Length: " + b"9" * 5000 + b"\r\n",
        b"Transfer-Encoding: gzip\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"X" * 10 + b"\x00: y\r\n",
        b"X: " + b"y" * 70_000 + b"\r\n",
        b"".join(b"X%d: y\r\n" % i for i in range(20_000)),
    ],
    ids=lambda lines: lines[:30].decode(errors="replace").strip(),
)
def test_a_head_of_contradictions_is_a_bad_request(served: Running, lines: bytes) -> None:
    with socket.create_connection(address(served), timeout=60) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\nhello")
        status = sock.recv(100).split(b"\r\n")[0].split()[1]
    assert status in (b"400", b"413", b"501")
    assert served.http.get("/health").status_code == 200


def test_a_body_that_is_smuggled_behind_a_length_is_no_second_request(served: Running) -> None:
    lines = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n"
    inner = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(address(served), timeout=60) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n" + inner
        )
        reply = all_of(sock)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert b"not both" in reply
    assert reply.count(b"HTTP/1.1 ") == 1


DEEP = [b"[" * 50_000, b'{"model": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"a":' * 3000]


@pytest.mark.parametrize("body", DEEP)
@pytest.mark.parametrize("path", [CHATS, "/v1/load_lora_adapter"])
def test_what_is_nested_deeply_is_a_bad_request(serve: Any, path: str, body: bytes) -> None:
    server = serve(admin_key="k")
    headers = {"content-type": "application/json", "authorization": "Bearer k"}
    refused(server.http.post(path, content=body, headers=headers), 400)
    inside = b'{"model": "shop", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, '
    inside += b'"metadata": {"a": ' + b"[" * 100 + b"]" * 100 + b"}}"
    assert server.http.post(CHATS, content=inside, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/%2e%2e/engine.py", "/page/..%2f..%2fengine.py", "/page//etc"]
)
def test_nothing_outside_the_pages_folder_is_given_out(served: Running, path: str) -> None:
    with socket.create_connection(address(served), timeout=60) as sock:
        sock.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        assert b" 404 " in all_of(sock).split(b"\r\n")[0]
