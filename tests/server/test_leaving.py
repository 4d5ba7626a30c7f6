"""Ends before the end: clients that leave free their rows, a server that is told to end drains."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from command import run_lorakit
from served import Running, address, head, refused, until

LONG: dict[str, Any] = {"model": "shop", "prompt": "hello", "max_tokens": 4000, "temperature": 0}
LEFT = 'lorakit_requests_total{route="/v1/completions",status="499"}'


def idle(server: Running) -> bool:
    return server.engine.running() + server.engine.waiting() == 0


@pytest.mark.parametrize("choices", [1, 3])
def test_a_client_that_leaves_a_stream_frees_its_rows(serve: Any, choices: int) -> None:
    server = serve()
    stream = server.openai.completions.create(**LONG, n=choices, stream=True)
    for _ in range(5):
        next(stream)
    assert server.engine.running() == choices
    stream.close()
    until(lambda: idle(server))
    assert server.complete().status_code == 200


@pytest.mark.parametrize("choices", [1, 3])
def test_a_client_that_leaves_while_it_waits_for_the_whole_frees_its_rows(
    serve: Any, choices: int
) -> None:
    server = serve()
    body = httpx.Request("POST", "http://x", json={**LONG, "n": choices}).content
    with socket.create_connection(address(server)) as sock:
        sock.sendall(head(len(body)) + body)
        until(lambda: server.engine.running() == choices)
    until(lambda: idle(server))
    assert server.complete().status_code == 200
    assert server.figure(LEFT) == 1


def test_a_client_that_leaves_the_queue_gives_its_place_up(serve: Any) -> None:
    server = serve({"waiting": 1}, max_rows=1)
    first = server.openai.completions.create(**LONG, stream=True)
    next(first)
    body = httpx.Request("POST", "http://x", json=LONG).content
    with socket.create_connection(address(server)) as sock:
        sock.sendall(head(len(body)) + body)
        until(lambda: server.engine.waiting() == 1)
        refused(server.complete(), 429)
    until(lambda: server.figure(LEFT) == 1)
    with server.http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as third:
        assert third.status_code == 200
    first.close()
    until(lambda: idle(server))


def test_many_clients_that_leave_at_once_leave_nothing_behind(serve: Any) -> None:
    server = serve()
    body = httpx.Request("POST", "http://x", json={**LONG, "stream": True}).content
    for _ in range(4):
        socks = [socket.create_connection(address(server)) for _ in range(20)]
        for sock in socks:
            sock.sendall(head(len(body)) + body)
        until(lambda: server.engine.running() == 4)
        for sock in socks:
            sock.close()
    until(lambda: idle(server))
    until(lambda: server.server._desk.inside == 0)
    assert server.complete().status_code == 200


# --- the real command ---------------------------------------------------------------------------


def without_progress(said: str) -> list[str]:
    """The lines of standard error but those that say how far loading is, on a busy machine."""
    return [line for line in said.splitlines() if not line.startswith("loading ")]


class Process:
    """`lorakit serve` as a person starts it."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "lorakit", "serve", *map(str, arguments), "--port", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.line)
        assert found, self.process.communicate(timeout=30)
        self.url = found.group()

    def end(self) -> tuple[int, str]:
        """The exit code, and what was said on standard error, without the progress of loading."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, "\n".join(without_progress(said))


@pytest.fixture
def start(base: Path, root: Path) -> Iterator[Any]:
    started: list[Process] = []

    def begin(*arguments: str) -> Process:
        options = ("--dtype", "float32", "--max-rows", "4")
        started.append(Process("--model", base, root / "shop", *options, *arguments))
        return started[-1]

    yield begin
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
            each.process.wait()


@pytest.mark.exhaustive
def test_the_command_says_what_it_serves_and_where(start: Any, base: Path) -> None:
    process = start()
    assert process.line.startswith(f"serving {base} with shop at http://127.0.0.1:")
    with httpx.Client(base_url=process.url) as client:
        reply = client.post("/v1/completions", json={**LONG, "max_tokens": 3})
        assert reply.json()["usage"]["completion_tokens"] == 3
    process.process.send_signal(signal.SIGINT)
    assert process.end() == (0, "")


@pytest.mark.exhaustive
def test_a_merged_adapter_is_served_alone_and_answers_as_beside_its_base(
    start: Any, served: Running
) -> None:
    process = start("--merged")
    assert process.line.startswith("serving shop at http://127.0.0.1:")
    body = {**LONG, "max_tokens": 12, "logprobs": 0}
    with httpx.Client(base_url=process.url) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [("shop", None)]
        merged = client.post("/v1/completions", json=body).json()["choices"][0]
        refused(client.post("/v1/completions", json={**body, "model": "poet"}), 404)
    beside = served.post("/v1/completions", body).json()["choices"][0]
    assert merged["text"] == beside["text"]
    figures = merged["logprobs"]["token_logprobs"]
    assert figures == pytest.approx(beside["logprobs"]["token_logprobs"], rel=1e-3, abs=1e-3)


def test_on_sigterm_running_answers_finish_and_new_requests_are_refused(start: Any) -> None:
    process = start("--drain", "60")
    with httpx.Client(base_url=process.url, timeout=60) as client:
        body = {**LONG, "max_tokens": 400, "stream": True}
        with (
            client.stream("POST", "/v1/completions", json=body) as stream,
            httpx.Client(base_url=process.url, timeout=60) as late,
        ):
            lines = stream.iter_lines()
            next(lines)
            process.process.send_signal(signal.SIGTERM)
            until(lambda: late.get("/health").status_code == 503)
            error = refused(late.post("/v1/completions", json=LONG), 503)
            assert error["code"] == "shutdown"
            events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in events[-2]
    assert process.end() == (0, "")


@pytest.mark.exhaustive
def test_after_the_time_to_drain_answers_are_cut_and_say_so(start: Any) -> None:
    process = start("--drain", "0.3")
    with httpx.Client(base_url=process.url, timeout=60) as client:
        body = {**LONG, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
    assert "the server ends before this answer" in events[-2]
    assert process.end() == (0, "")


@pytest.mark.exhaustive
def test_a_second_signal_ends_at_once(start: Any) -> None:
    process = start("--drain", "60")
    with (
        httpx.Client(base_url=process.url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json={**LONG, "n": 4, "stream": True}) as stream,
        httpx.Client(base_url=process.url, timeout=60) as late,
    ):
        next(stream.iter_lines())
        process.process.send_signal(signal.SIGTERM)
        until(lambda: late.get("/health").status_code == 503)
        started = time.monotonic()
        process.process.send_signal(signal.SIGTERM)
        assert process.end()[0] == 0
        assert time.monotonic() - started < 40


@pytest.mark.exhaustive
def test_keys_may_come_from_the_environment(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_API_KEY", "from-outside")
    process = start()
    refused(httpx.get(f"{process.url}/v1/models"), 401)
    headers = {"Authorization": "Bearer from-outside"}
    assert httpx.get(f"{process.url}/v1/models", headers=headers).status_code == 200


def test_what_cannot_be_served_is_said_in_one_line(base: Path, root: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases: list[tuple[tuple[str | Path, ...], str]] = [
            ((), "nothing to serve"),
            (("--model", base, "--host", "0.0.0.0"), "give --api-key"),
            (("--model", base, "--port", port), f"cannot listen on 127.0.0.1, port {port}"),
            (("--model", base, "--dry-run"), "--engine vllm"),
            (("--model", base, "--merged"), "merged serves one adapter, not 0"),
            (
                (root / "shop", "--merged", "--adapter-root", root, "--admin-key", "k"),
                "--merged serves a single adapter",
            ),
            (("--model", base, "--max-rows", "2", "--engine", "vllm"), "is for --engine lorakit"),
            ((root / "shop", root / "shop"), "are both named shop"),
            ((tmp_path / "none",), "none"),
            (("--model", base, "--adapter-root", tmp_path / "none"), "is not a folder"),
            (("--model", base, "--api-keys", tmp_path / "none"), "--api-keys: cannot read"),
            (
                ("--model", base, "--engine", "vllm", "--api-key", "a", "--api-key", "b"),
                "vLLM takes one --api-key",
            ),
        ]
        for arguments, words in cases:
            done = run_lorakit(tmp_path, "serve", *arguments)
            assert done.returncode == 2, done
            errors = without_progress(done.stderr)
            assert len(errors) == 1
            assert errors[0].startswith("error: ")
            assert words in errors[0]
    assert not list(tmp_path.iterdir())


def test_health_says_that_the_engine_has_stopped(serve: Any) -> None:
    server = serve({})
    server.engine.close()
    assert "start the server again" in refused(server.http.get("/health"), 503)["message"]
    assert "closed" in refused(server.complete(), 503)["message"]
