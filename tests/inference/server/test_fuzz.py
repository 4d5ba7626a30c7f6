"""A fuzz of the API by its own description: what keeps to it is answered, what does not is refused.

schemathesis makes requests of the description that the server gives of itself, and checks that
every reply is one that stands there. Half of the requests name a model that there is, as the others
end where it is looked up.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from schemathesis.specs.openapi import checks

from lorakit.inference.server.options import Limits, ServerOptions
from lorakit.inference.server.replies import ChatChunk, Completion
from served import Running, refused, running, until

ADMIN = {"Authorization": "Bearer admin-key"}
KNOWN = {"model": "shop", "lora_name": "poet", "lora_path": "poet"}
OPERATIONS = [
    ("/v1/chat/completions", "POST", 120),
    ("/v1/completions", "POST", 120),
    ("/v1/load_lora_adapter", "POST", 40),
    ("/v1/unload_lora_adapter", "POST", 40),
    ("/v1/models/{model}", "GET", 30),
]
WITHOUT_PARAMETERS = {("/v1/models", "GET"), ("/metrics", "GET"), ("/health", "GET")}
CHUNKS: dict[str, TypeAdapter[Any]] = {
    "/v1/chat/completions": TypeAdapter(ChatChunk),
    "/v1/completions": TypeAdapter(Completion),
}
MODES = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]


@pytest.fixture(scope="module")
def server(base: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("fuzzed") / "adapters"
    shutil.copytree(root, folder)
    options = ServerOptions(
        port=0,
        admin_key="admin-key",
        adapter_root=folder,
        limits=Limits(request_seconds=0.3),  # an answer may be wanted as long as the context
    )
    with running(base, {"shop": folder / "shop"}, options, max_rows=4) as started:
        yield started


@pytest.fixture(scope="module")
def description(server: Running) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_all_that_the_description_has_is_fuzzed(description: Any) -> None:
    found = {
        (each.ok().path, each.ok().method.upper()) for each in description.get_all_operations()
    }
    assert found == {(path, method) for path, method, _ in OPERATIONS} | WITHOUT_PARAMETERS


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method", "examples"), OPERATIONS)
def test_every_reply_is_one_that_the_description_has(
    server: Running, description: Any, path: str, method: str, examples: int, mode: Any
) -> None:
    operation = description[path][method]
    statuses: Counter[int] = Counter()
    streamed: Counter[str] = Counter()

    @seed(1)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=operation.as_strategy(generation_mode=mode), known=st.booleans(), stream=st.booleans()
    )
    def ask(case: Any, known: bool, stream: bool) -> None:
        if known and isinstance(case.body, dict):
            _make_sensible(case.body, stream)
        response = case.call(headers=ADMIN, timeout=20)
        case.validate_response(
            response,
            checks=[
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            ],
        )
        status = response.status_code
        assert status < 500 or status == 503
        if status >= 400:
            _require_openais_form(response)
        elif response.headers["content-type"][0].startswith("text/event-stream"):
            _require_chunks(response.content, CHUNKS[path])
            streamed[path] += 1
        statuses[status] += 1

    ask()
    if mode is MODES[0] and "completions" in path:
        assert streamed[path], "nothing was streamed"
        assert statuses[200] > streamed[path], f"nothing was answered whole: {statuses}"
    until(lambda: server.engine.running() + server.engine.waiting() == 0)
    assert server.complete().status_code == 200


def _make_sensible(body: dict[str, Any], stream: bool) -> None:
    """Fills in what a description cannot tell."""
    body |= {name: KNOWN[name] for name in body if name in KNOWN}
    if "model" in body:
        body["stream"] = stream
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            message.setdefault("content", "hello")
            if message.get("role") != "assistant":
                message.pop("tool_calls", None)
    for alone in ("top_logprobs", "max_completion_tokens", "stream_options", "best_of"):
        body.pop(alone, None)  # they go together with others


def _require_openais_form(response: Any) -> None:
    headers = {"content-type": response.headers["content-type"][0]}
    status = response.status_code
    refused(httpx.Response(status, headers=headers, content=response.content), status)


def _require_chunks(content: bytes, kind: TypeAdapter[Any]) -> None:
    *events, _ = content.decode().split("\n\n")  # schemathesis leaves a long stream
    for number, event in enumerate(events):
        data = event.removeprefix("data: ")
        if number == len(events) - 1 and data == "[DONE]":
            continue
        if data.startswith('{"error"'):  # its time was over
            assert set(json.loads(data)["error"]) == {"message", "type", "param", "code"}
        else:
            kind.validate_json(data, strict=True, extra="forbid")
