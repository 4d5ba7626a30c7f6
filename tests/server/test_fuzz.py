"""Requests drawn from the server's own description (OpenAPI), right and wrong ones, to a real one.

Some of each draw is made to reach the engine or the adapters: a name that is served in place of the
drawn one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from schemathesis.specs.openapi import checks

from lorakit.server.options import Limits, ServerOptions
from lorakit.server.replies import ChatChunk, Completion
from random_adapters import make_reward_model
from served import Running, running, until

KNOWN: dict[str, tuple[Any, ...]] = {
    "model": ("shop", "poet"),
    "messages": ([{"role": "user", "content": "hello"}],),
    "lora_name": ("third",),
    "lora_path": ("poet", "shop"),
}
"""What is served, can be loaded, or makes sense beside the other fields, by field."""
OF_PATH: dict[str, dict[str, tuple[Any, ...]]] = {
    "/v1/completions": {"prompt": ("hello",)},
    "/pooling": {"model": ("reward",), "input": ("hello", ["a", [1, 2]]), "messages": (None,)},
    "/v1/embeddings": {"input": ("hello", ["a", [1, 2]])},
    "/v1/responses": {"input": ("hello",), "stream": (False,), "text": (None,)},
    "/tokenize": {"prompt": ("hello",), "messages": (None,), "tools": (None,)},
    "/detokenize": {"tokens": ([1, 2],)},
    **{path: {"model": ("reward",)} for path in ("/v1/score", "/score")},
    **{path: {"model": ("reward",)} for path in ("/v1/rerank", "/rerank", "/v2/rerank")},
    **{path: {"model": ("mood",), "input": ("a",)} for path in ("/classify", "/v1/classify")},
}
"""The same for the fields of one route."""
DEPENDENT = (
    *("stream_options", "top_logprobs", "best_of", "max_tokens", "logit_bias", "dimensions"),
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_grammar"),
    *("guided_choice", "tools", "tool_choice", "parallel_tool_calls", "add_special_tokens"),
    *("previous_response_id", "temperature", "top_p"),
    *("data_1", "data_2", "queries", "items", "truncation_side", "max_tokens_per_doc"),
    *("max_tokens_per_query",),
    *("min_tokens", "stop_token_ids", "allowed_token_ids", "prompt_logprobs"),
    *("truncate_prompt_tokens", "add_generation_prompt", "continue_final_message"),
)
"""Fields that are refused beside some values of others, which the description cannot say."""
CHUNKS: dict[str, TypeAdapter[Any]] = {
    "/v1/chat/completions": TypeAdapter(ChatChunk),
    "/v1/completions": TypeAdapter(Completion),
}
CHECKS: list[Any] = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
ROUTES = [
    ("POST", "/v1/chat/completions", 120),
    ("POST", "/v1/completions", 120),
    ("POST", "/pooling", 60),
    ("POST", "/v1/responses", 60),
    ("POST", "/v1/embeddings", 20),
    ("POST", "/v1/score", 20),
    ("POST", "/score", 5),
    ("POST", "/v1/rerank", 20),
    ("POST", "/rerank", 5),
    ("POST", "/v2/rerank", 5),
    ("POST", "/classify", 20),
    ("POST", "/v1/classify", 5),
    ("POST", "/tokenize", 20),
    ("POST", "/detokenize", 20),
    ("POST", "/v1/load_lora_adapter", 40),
    ("POST", "/v1/unload_lora_adapter", 40),
    ("GET", "/v1/models", 5),
    ("GET", "/v1/models/{model}", 25),
    ("GET", "/health", 5),
    ("GET", "/metrics", 5),
]
RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
# Only bodies can be wrong: every path is a text.
CASES = [
    (*route, m) for route in ROUTES for m in (RIGHT, WRONG) if m is RIGHT or route[0] == "POST"
]


@pytest.fixture(scope="module")
def fuzzed(base: Path, root: Path, tmp_path_factory: Any) -> Iterator[Running]:
    """A server whose answers, which never end by themselves, are cut very soon."""
    limits = Limits(request_seconds=0.15, waiting=16, body_bytes=100_000)
    options = ServerOptions(port=0, admin_key="admin", adapter_root=root, limits=limits)
    adapters = {name: root / name for name in ("shop", "poet")}
    adapters["reward"] = make_reward_model(base, tmp_path_factory.mktemp("reward") / "reward")
    adapters["mood"] = make_reward_model(base, tmp_path_factory.mktemp("mood") / "mood", 3)
    with running(base, adapters, options, 8) as server:
        server.http.headers["Authorization"] = "Bearer admin"
        yield server


def _schema(server: Running) -> Any:
    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    schema.config.generation.update(with_security_parameters=False)  # keys have their own tests
    return schema


def test_every_route_that_the_server_describes_is_fuzzed(fuzzed: Running) -> None:
    described = fuzzed.http.get("/openapi.json").json()["paths"]
    told = {(method.upper(), path) for path, methods in described.items() for method in methods}
    assert told == {(method, path) for method, path, _ in ROUTES}


@pytest.mark.parametrize(("method", "path", "draws", "mode"), CASES)
def test_whatever_is_asked_gets_an_answer_of_the_described_form(
    fuzzed: Running, method: str, path: str, draws: int, mode: schemathesis.GenerationMode
) -> None:
    operation = _schema(fuzzed)[path][method]
    wrong = mode is WRONG
    statuses: list[int] = []
    late: list[bool] = []
    streamed: list[bool] = []

    @given(operation.as_strategy(generation_mode=mode), st.data())
    @settings(
        max_examples=max(5, draws * settings.default.max_examples // 100),
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any, data: st.DataObject) -> None:
        if not wrong and isinstance(case.body, dict):
            if path == "/pooling":  # one of them
                case.body = {"messages": None, "input": "hello", **case.body}
            if path.endswith("/score"):
                case.body = {**case.body, "text_1": "a", "text_2": ["b", "c"], "documents": None}
            if path == "/tokenize":
                case.body = {"messages": None, "prompt": "hello", **case.body}
            values = KNOWN | OF_PATH.get(path, {})
            for field in sorted(set(values) & set(case.body)):
                known = st.sampled_from(values[field])
                case.body[field] = data.draw(st.one_of(known, known, st.just(case.body[field])))
            plain = data.draw(st.booleans())  # whatever was asked before, or the draws are flaky
            if path in CHUNKS:
                case.body["stream"] = len(statuses) % 2 == 0
            if plain or case.body.get("stream"):
                case.body = {k: v for k, v in case.body.items() if k not in DEPENDENT}
        reply = case.call(base_url=fuzzed.url, headers={"Authorization": "Bearer admin"})
        statuses.append(reply.status_code)
        assert reply.status_code < 500 or reply.status_code == 503, reply.text
        if reply.status_code == 503 and reply.json()["error"]["code"] == "timeout":
            late.append(True)  # by a machine that is too busy for a pass in so little time
        # A body that is right after all, as it was sent, is for schemathesis to tell.
        # One that is too large besides is refused before anybody looks into it.
        more = [checks.negative_data_rejection] if wrong and reply.status_code != 413 else []
        case.validate_response(reply, checks=[*CHECKS, *more])

        if reply.headers["content-type"][0].startswith("text/event-stream"):
            _require_chunks(reply.text, CHUNKS[path])
            streamed.append(True)

    ask()
    if not wrong:
        assert 200 in statuses or late or path == "/v1/models/{model}", "no draw came through"
        assert streamed or path not in CHUNKS, "no draw was streamed"
    until(lambda: fuzzed.engine.running() + fuzzed.engine.waiting() == 0)


def _require_chunks(text: str, kind: TypeAdapter[Any]) -> None:
    *events, _ = text.split("\n\n")
    for number, event in enumerate(events):
        data = event.removeprefix("data: ")
        if number == len(events) - 1 and data == "[DONE]":  # schemathesis leaves a long stream
            continue
        if data.startswith('{"error"'):  # its time was over
            assert set(json.loads(data)["error"]) == {"message", "type", "param", "code"}
        else:
            kind.validate_json(data, strict=True, extra="forbid")


def test_after_all_of_it_the_server_answers(fuzzed: Running) -> None:
    assert fuzzed.complete().status_code == 200
