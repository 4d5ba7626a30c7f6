"""A key has what is its own: the ids of another's are tried on every route that there is."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from sdk_rows import datum, lost_client
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto

from lorakit.server.keys import caller_of
from lorakit.server.options import ApiKey, ServerOptions
from lorakit.server.training.routes import TrainingRoutes
from served import Running, running

MINE, THEIRS, ADMIN = "tml-mine", "tml-theirs", "tml-admin"
MARK = "known-to-its-owner-alone"
NOTHING = "names nothing of anyone"


@dataclass
class World:
    """What the first key has, with all the ids that another key could name."""

    session_id: str
    model_id: str
    sampler_id: str
    weights: str
    sampled: str
    external: str
    request_id: str
    sample_id: str
    seq: int

    def next(self) -> dict[str, Any]:
        return {"model_id": self.model_id, "seq_id": self.seq}

    def ids(self) -> list[str]:
        return [self.session_id, self.model_id, self.sampler_id, self.weights, self.request_id]


Body = Any
SAMPLING = {
    "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
    "sampling_params": {"max_tokens": 2, "stop": []},
}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


def rows(world: World) -> bytes:
    given = types.ForwardBackwardInput(data=[datum([1, 2, 3, 4])], loss_fn="cross_entropy")
    request = types.ForwardBackwardRequest(**world.next(), forward_backward_input=given)
    return forward_backward_request_to_proto(request).SerializeToString()


def checkpoint(world: World, path: str) -> dict[str, str]:
    return {"run_id": world.model_id, "checkpoint_id": path.split("/", 3)[3]}


@dataclass
class Case:
    """How a route is asked for something of another's.

    Attributes:
        body: JSON, bytes of a message, or nothing.
        path: its parameters.
        ordered: whether it takes a place in the model's sequence.
    """

    body: Callable[[World], Any] = lambda world: None
    path: Callable[[World], dict[str, str]] = lambda world: {}
    ordered: bool = False
    query: dict[str, str] = field(default_factory=dict)


def of_checkpoint(path: Callable[[World], str], body: Any = None) -> Case:
    return Case(lambda world: body, lambda world: checkpoint(world, path(world)))


def ordered(**more: Any) -> Case:
    return Case(lambda world: world.next() | more, ordered=True)


CHECKPOINT = "/api/v1/training_runs/{run_id}/checkpoints/{checkpoint_id}"
# In the order in which they are tried: what ends something comes last.
CASES: dict[tuple[str, str], Case | str] = {
    ("POST", "/api/v1/session_heartbeat"): Case(lambda w: {"session_id": w.session_id}),
    ("GET", "/api/v1/sessions"): Case(),
    ("GET", "/api/v1/sessions/{session_id}"): Case(path=lambda w: {"session_id": w.session_id}),
    ("POST", "/api/v1/create_model"): Case(
        lambda w: {"session_id": w.session_id, "model_seq_id": 9, "base_model": "base",
                   "lora_config": {"rank": 1}}
    ),
    ("POST", "/api/v1/get_info"): Case(lambda w: {"model_id": w.model_id}),
    ("POST", "/api/v1/forward_backward"): Case(rows, ordered=True),
    ("POST", "/api/v1/optim_step"): ordered(adam_params={"learning_rate": 1e-2}),
    ("POST", "/api/v1/save_weights"): ordered(path="tried"),
    ("POST", "/api/v1/save_weights_external"): ordered(path="tried"),
    ("POST", "/api/v1/save_weights_for_sampler"): ordered(sampling_session_seq_id=7),
    ("POST", "/api/v1/load_weights"): Case(
        lambda w: w.next() | {"path": w.weights, "optimizer": True}, ordered=True
    ),
    ("POST", "/api/v1/create_sampling_session"): Case(
        lambda w: {"session_id": w.session_id, "sampling_session_seq_id": 8,
                   "model_path": w.sampled}
    ),
    ("POST", "/api/v1/join_sampling_session"): Case(
        lambda w: {"sampling_session_id": w.sampler_id}
    ),
    ("GET", "/api/v1/samplers/{sampler_id}"): Case(path=lambda w: {"sampler_id": w.sampler_id}),
    ("POST", "/api/v1/asample"): Case(
        lambda w: SAMPLING | {"sampling_session_id": w.sampler_id, "seq_id": 50}
    ),
    ("POST", "/api/v1/retrieve_future"): Case(lambda w: {"request_id": w.request_id}),
    ("POST", "/api/v1/retrieve_futures"): Case(
        lambda w: {"target": {"sampling_session_id": w.sampler_id}, "timeout": 0}
    ),
    ("POST", "/api/v1/weights_info"): Case(lambda w: {"tinker_path": w.weights}),
    ("GET", "/api/v1/training_runs"): Case(),
    ("GET", "/api/v1/training_runs/{run_id}"): Case(path=lambda w: {"run_id": w.model_id}),
    ("GET", "/api/v1/training_runs/{run_id}/checkpoints"): Case(
        path=lambda w: {"run_id": w.model_id}
    ),
    ("GET", "/api/v1/checkpoints"): Case(),
    ("GET", "/api/v1/billing/usage/checkpoints/current"): Case(),
    ("GET", f"{CHECKPOINT}/external_weights_urls"): of_checkpoint(lambda w: w.external),
    ("GET", "/api/v1/downloads/{run_id}/{kind}/{name}/{file}"): Case(
        path=lambda w: {"run_id": w.model_id, "kind": "external_weights", "name": "given",
                        "file": "adapter_config.json"},
        query={"expires": "99999999999", "signature": "0" * 64},
    ),
    ("PUT", f"{CHECKPOINT}/ttl"): of_checkpoint(lambda w: w.weights, {"ttl_seconds": 9999}),
    ("POST", "/v1/chat/completions"): Case(lambda w: CHAT | {"model": w.sampled}),
    ("POST", "/v1/completions"): Case(
        lambda w: {"model": f"tinker://{w.model_id}", "prompt": "a", "max_tokens": 2}
    ),
    ("POST", "/pooling"): Case(lambda w: {"model": w.sampled, "input": "a"}),
    ("POST", "/v1/responses"): Case(
        lambda w: {"model": w.sampled, "input": "a", "max_output_tokens": 2}
    ),
    ("POST", "/v1/embeddings"): Case(lambda w: {"model": w.sampled, "input": "a"}),
    **{
        ("POST", path): Case(lambda w: {"model": w.sampled, "text_1": "a", "text_2": "b"})
        for path in ("/v1/score", "/score")
    },
    **{
        ("POST", path): Case(lambda w: {"model": w.sampled, "query": "a", "documents": ["b"]})
        for path in ("/v1/rerank", "/rerank", "/v2/rerank")
    },
    **{
        ("POST", path): Case(lambda w: {"model": w.sampled, "input": "a"})
        for path in ("/v1/classify", "/classify")
    },
    ("POST", "/tokenize"): Case(lambda w: {"model": w.sampled, "prompt": "a"}),
    ("POST", "/detokenize"): Case(lambda w: {"model": w.sampled, "tokens": [5]}),
    ("GET", "/v1/models"): Case(),
    ("GET", "/v1/models/{model}"): Case(path=lambda w: {"model": w.sampled}),
    ("GET", "/metrics"): Case(),
    ("GET", "/training/state"): Case(),
    ("POST", f"{CHECKPOINT}/publish"): of_checkpoint(lambda w: w.weights),
    ("DELETE", f"{CHECKPOINT}/publish"): of_checkpoint(lambda w: w.weights),
    ("POST", "/api/v1/cancel_future"): Case(lambda w: {"request_id": w.sample_id}),
    ("DELETE", CHECKPOINT): of_checkpoint(lambda w: w.weights),
    ("POST", "/api/v1/unload_model"): Case(lambda w: {"model_id": w.model_id}),
    ("POST", "/api/v1/sessions/{session_id}/finish"): Case(
        lambda w: {"reason": {"type": "success"}}, lambda w: {"session_id": w.session_id}
    ),
    ("POST", "/api/v1/client/config"): NOTHING,
    ("POST", "/api/v1/client/dynamic_config"): NOTHING,
    ("POST", "/api/v1/telemetry"): NOTHING,
    ("GET", "/api/v1/healthz"): NOTHING,
    ("GET", "/api/v1/get_server_capabilities"): NOTHING,
    ("POST", "/api/v1/create_session"): NOTHING,
    ("POST", "/v1/load_lora_adapter"): NOTHING,
    ("POST", "/v1/unload_lora_adapter"): NOTHING,
    ("GET", "/health"): NOTHING,
    ("GET", "/openapi.json"): NOTHING,
    ("GET", "/"): NOTHING,
    ("GET", "/training"): NOTHING,
    ("GET", "/page/{path}"): NOTHING,
}  # fmt: skip
LISTS = {"/api/v1/sessions", "/api/v1/training_runs", "/api/v1/checkpoints", "/v1/models",
         "/api/v1/billing/usage/checkpoints/current", "/metrics", "/training/state"}  # fmt: skip
WITHOUT_OWNER = {  # the owner's own request is refused, or answers nothing that tells
    "/api/v1/downloads/{run_id}/{kind}/{name}/{file}", "/pooling", "/api/v1/cancel_future",
    "/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank", "/v1/embeddings",
    "/tokenize", "/detokenize", "/v1/classify", "/classify",
}  # fmt: skip


@pytest.fixture(scope="module")
def keyed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = ServerOptions(
        port=0,
        api_keys=(ApiKey(MINE, "mine"), ApiKey(THEIRS)),
        admin_key=ADMIN,
        training_state=tmp_path_factory.mktemp("keyed"),
    )
    with running(base, {}, options, max_rows=4) as server:
        yield server


@pytest.fixture(scope="module")
def world(keyed: Running) -> Iterator[World]:
    """A session of the first key with something of everything."""
    marks = {"user_metadata": {"mark": MARK}, "display_name": MARK}
    with lost_client(keyed.url, MINE, **marks) as client:  # the test finishes its session
        yield made(client)


def asked(server: Running, key: str, method: str, path: str, case: Case, world: World) -> Any:
    place, body = path.format(**case.path(world)), case.body(world)
    content = {"content": body} if isinstance(body, bytes) else {"json": body} if body else {}
    headers = {"X-API-Key": key}
    return server.http.request(method, place, headers=headers, params=case.query, **content)


def outcome(server: Running, key: str, answer: httpx.Response) -> tuple[int, str]:
    """The status and text of an answer, or of the result that it promises; a failure is 400."""
    text = answer.text
    if answer.status_code == 200 and "request_id" in text and "completions" not in text:
        begun = {"request_id": answer.json()["request_id"]}
        headers = {"X-API-Key": key}
        answer = server.http.post("/api/v1/retrieve_future", json=begun, headers=headers)
        text += answer.text
        if "json" in answer.headers["content-type"] and "error" in answer.json():
            return 400, text
    return answer.status_code, text


def routes(server: Running) -> list[tuple[str, str]]:
    app: Any = server.server.config.app
    refused = {f"/api/v1/{path}" for _, path in _refused()}
    return [
        (method, route.path_format)
        for route in app.routes
        for method in route.methods
        if route.path_format not in refused and method != "HEAD"
    ]


def _refused() -> list[tuple[str, str]]:
    from lorakit.server.training.refused_routes import REFUSED

    return [*REFUSED]


def made(client: Any) -> World:
    run = client.create_lora_training_client(
        "base", rank=3, seed=1, user_metadata={"mark": MARK}
    ).result()
    run.forward_backward([datum([1, 2, 3])], "cross_entropy").result()
    weights = run.save_state("kept", user_metadata={"mark": MARK}).result().path
    sampled = run.save_weights_for_sampler("to-sample").result().path
    external = run.save_weights_external("given").result().path
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([5, 6])
    sampler.sample(prompt, 1, types.SamplingParams(max_tokens=1)).result()
    model_id = run.get_info().model_id
    sampler_id = sampler._sampling_session_id
    return World(
        model_id.partition(":")[0], model_id, sampler_id, weights, sampled, external,
        f"{model_id}:1", f"{sampler_id}:0", seq=6,
    )  # fmt: skip


def state_of(server: Running, world: World, state: Path) -> str:
    """A digest of all that the first key has."""
    found = hashlib.sha256()
    for file in sorted(state.rglob("*")):
        if file.is_file() and file.name != ".lorakit.lock":
            found.update(str(file.relative_to(state)).encode() + file.read_bytes())
    app: Any = server.server.config.app
    training: TrainingRoutes = app.state.training
    run = training._service._runs[world.model_id]
    for tensor in server.engine.resident.trained(run.adapter).values():
        found.update(tensor.detach().numpy().tobytes())
        found.update(b"" if tensor.grad is None else tensor.grad.numpy().tobytes())
    headers = {"X-API-Key": MINE}
    for path in (f"sessions/{world.session_id}", f"samplers/{world.sampler_id}"):
        found.update(server.http.get(f"/api/v1/{path}", headers=headers).content)
    return found.hexdigest()


def test_every_route_knows_a_key_s_own_things_alone(keyed: Running, world: World):
    app: Any = keyed.server.config.app
    state = app.state.training._service.store.state
    missing = [route for route in routes(keyed) if route not in CASES]
    assert not missing, f"say in CASES what these routes name, or that it is nothing: {missing}"
    gone = [route for route in CASES if route not in routes(keyed)]
    assert not gone, f"these routes are no more: {gone}"

    before = state_of(keyed, world, state)
    for (method, path), case in CASES.items():
        if isinstance(case, str):
            continue
        sent = json.dumps([case.path(world), str(case.body(world))])
        status, text = outcome(keyed, THEIRS, asked(keyed, THEIRS, method, path, case, world))
        if path in LISTS:
            assert status == 200, (path, text)
        elif path != "/api/v1/cancel_future":  # which says nothing
            assert 400 <= status < 500, (path, status, text)
        assert MARK not in text, path
        told = [one for one in world.ids() if one in text and one not in sent]
        assert not told, (path, text)
        assert 'key="mine"' not in text, path
        assert state_of(keyed, world, state) == before, f"{method} {path} changed something"

    # The same requests of the admin and of the owner are answered: they were what they should be.
    for (method, path), case in CASES.items():
        if isinstance(case, str) or path in WITHOUT_OWNER:
            continue
        for key in (ADMIN, MINE) if method == "GET" and not case.ordered else (MINE,):
            answer = asked(keyed, key, method, path, case, world)
            status, text = outcome(keyed, key, answer) if path not in LISTS else (
                answer.status_code, answer.text,
            )  # fmt: skip
            assert status < 300, (key, path, text)
            if path in LISTS:
                known = ["mine", *world.ids(), world.sampled, 'key="mine"']
                assert any(one in text for one in known), (key, path)
        world.seq += case.ordered


def test_without_a_key_nothing_but_the_pages_and_health_is_answered(keyed: Running):
    app: Any = keyed.server.config.app
    for route in app.routes:
        for method in route.methods:
            path = route.path_format.replace("{path}", "page.css")
            status = keyed.http.request(method, path).status_code
            if path in ("/", "/training", "/health", "/page/page.css"):
                assert status == 200, path
            elif "/downloads/" in path:
                assert status == 403, path  # it is not signed
            else:
                assert status == 401, path


def test_an_owner_is_told_by_the_key_alone_and_the_admin_sees_all(keyed: Running):
    app: Any = keyed.server.config.app

    def caller(**headers: str) -> Any:
        raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
        return app.state.keys.caller(raw)

    mine = caller(**{"X-API-Key": MINE})
    assert mine == caller(Authorization=f"Bearer {MINE}")
    assert not mine.sees(caller(**{"X-API-Key": THEIRS}).owner)
    assert caller(**{"X-API-Key": ADMIN}).sees(mine.owner)
    assert mine.sees("")
    assert MINE not in repr(mine)
    assert caller_of.__module__ == "lorakit.server.keys"
