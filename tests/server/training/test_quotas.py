"""Limits by key: said in clear words, in finite time, and harming nobody else."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
from sdk_rows import datum, lost_client, vanish
from tinker import types

from lorakit.errors import InputError
from lorakit.server.errors import ApiError
from lorakit.server.options import ServerOptions, TrainingLimits
from lorakit.server.training.quotas import DiskQuota, Quotas
from lorakit.server.training.service import TrainingService
from served import Running, running

# In memory there is room for one adapter of rank 4 that is more than the smallest.
LIMITS = TrainingLimits(models=2, tokens=300, disk_bytes=120_000, memory_bytes=80_000)
ROW = [5, 6, 7, 8, 9]
ADAM = types.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def limited(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    state = tmp_path_factory.mktemp("limited")
    options = ServerOptions(port=0, training_state=state, training_limits=LIMITS)
    with running(base, {}, options, max_rows=2) as server:
        yield server


@pytest.fixture
def client(limited: Running, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Of a key of its own."""
    key = f"tml-{request.node.name}"
    with tinker.ServiceClient(base_url=limited.url, api_key=key) as client:
        yield client


@pytest.fixture
def flood(limited: Running) -> Iterator[Any]:
    with tinker.ServiceClient(base_url=limited.url, api_key="tml-flood") as client:
        yield client


@pytest.fixture
def gone(limited: Running) -> Iterator[Any]:
    """A client whose session ends before it does."""
    with lost_client(limited.url, "tml-gone") as client:
        yield client


def service_of(server: Running) -> TrainingService:
    app: Any = server.server.config.app
    service: TrainingService = app.state.training._service
    return service


def test_a_key_has_so_many_models_and_more_when_one_is_gone(limited: Running, client: Any):
    def create(of: Any = client) -> Any:
        return of.create_lora_training_client("base", rank=1, train_unembed=False).result()

    create()
    create()
    with pytest.raises(tinker.RequestFailedError, match="this key has 2 models") as refused:
        create()
    assert refused.value.category == types.RequestErrorCategory.User
    with tinker.ServiceClient(base_url=limited.url, api_key="tml-other") as other:
        create(other)
    key = "tml-test_a_key_has_so_many_models_and_more_when_one_is_gone"
    with tinker.ServiceClient(base_url=limited.url, api_key=key) as again:
        client.close("success").result()
        create(again)


def test_too_many_tokens_fail_in_finite_time_and_others_wait_for_room(client: Any):
    run = client.create_lora_training_client("base", rank=1, train_unembed=False).result()
    with pytest.raises(tinker.RequestFailedError, match="400 tokens") as refused:
        run.forward_backward([datum([1] * 401)], "cross_entropy").result(timeout=30)
    assert refused.value.category == types.RequestErrorCategory.User
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(ROW)
    params = types.SamplingParams(max_tokens=300)
    with pytest.raises(tinker.RequestFailedError, match="305 tokens"):
        sampler.sample(prompt, 1, params).result(timeout=30)
    # More than the limit in all: the SDK repeats what is refused for now, and all is done.
    begun = [run.forward_backward([datum(ROW * 10)] * 4, "cross_entropy") for _ in range(3)]
    assert [len(one.result(timeout=60).loss_fn_outputs) for one in begun] == [4] * 3
    params = types.SamplingParams(max_tokens=60, stop=[])
    sampled = [sampler.sample(prompt, 1, params) for _ in range(6)]
    assert all(len(one.result(timeout=60).sequences[0].tokens) == 60 for one in sampled)


def test_a_request_that_others_wait_for_is_let_in_when_they_fill_the_limit():
    quotas = Quotas(TrainingLimits(tokens=100))
    with quotas.under_way("a", 90):
        quotas.require_room("b", 100)
        with pytest.raises(ApiError) as refused:
            quotas.require_room("a", 20)
        assert refused.value.status_code == 429
        assert refused.value.headers is not None
        assert "Retry-After" in refused.value.headers
    quotas.require_room("a", 100)
    assert not quotas.tokens


def test_chunks_that_come_before_the_first_cannot_lock_it_out(limited: Running, client: Any):
    from test_sequence import body

    run = client.create_lora_training_client("base", rank=1, train_unembed=False).result()
    model_id = run.get_info().model_id
    key = {"X-API-Key": "tml-test_chunks_that_come_before_the_first_cannot_lock_it_out"}

    def send(seq_id: int) -> Any:
        content = body(model_id, seq_id, [7] * 121)
        return limited.http.post("/api/v1/forward_backward", content=content, headers=key)

    assert [send(seq_id).status_code for seq_id in (2, 3)] == [200, 200]
    full = send(4)
    assert full.status_code == 429
    assert "under way" in full.json()["error"]["message"]
    begun = send(1).json()
    answer = limited.post("/api/v1/retrieve_future", begun, headers=key)
    assert answer.headers["content-type"] == "application/x-protobuf"


def test_a_full_disk_quota_refuses_the_next_checkpoint_until_one_is_deleted(
    limited: Running, client: Any
):
    run = client.create_lora_training_client("base", rank=2, train_unembed=False).result()
    rest = client.create_rest_client()
    paths = []

    def save_many() -> None:
        for number in range(20):
            paths.append(run.save_state(f"n{number}").result().path)

    with pytest.raises(tinker.RequestFailedError, match="is the limit: delete") as refused:
        save_many()
    assert refused.value.category == types.RequestErrorCategory.User
    assert paths
    service = service_of(limited)
    owner = service.store.run(run.get_info().model_id).owner
    assert 0 < service.quotas.disk.used()[owner] <= LIMITS.disk_bytes
    rest.delete_checkpoint_from_tinker_path(paths[0]).result()
    assert run.save_state("again").result().path
    # What is overwritten counts once, and is there.
    before = service.quotas.disk.used()[owner]
    run.save_state("again", overwrite=True).result()
    assert service.quotas.disk.used()[owner] == pytest.approx(before, abs=200)
    sizes = [
        c.size_bytes for c in rest.list_checkpoints(run.get_info().model_id).result().checkpoints
    ]
    assert sum(sizes) == service.quotas.disk.used()[owner]
    # Snapshots make room for each other, and count too.
    for path in paths[1:]:
        rest.delete_checkpoint_from_tinker_path(path).result()
    samplers = [run.save_weights_and_get_sampling_client().result() for _ in range(12)]
    assert service.quotas.disk.used()[owner] <= LIMITS.disk_bytes
    prompt = types.ModelInput.from_ints(ROW)
    params = types.SamplingParams(max_tokens=1)
    assert samplers[-1].sample(prompt, 1, params).result().sequences
    with pytest.raises(tinker.RequestFailedError, match="are gone"):
        samplers[0].sample(prompt, 1, params).result(timeout=30)


def test_the_disk_quota_counts_what_is_taken_and_given_back():
    quota = DiskQuota(100)
    quota.take("a", 60)
    with pytest.raises(InputError, match="60 bytes on disk, these have 50 more, and 100"):
        quota.take("a", 50)
    quota.take("b", 100)
    quota.take("a", -60)
    quota.take("a", 100)
    assert quota.used() == {"a": 100, "b": 100}
    DiskQuota(0).take("a", 1 << 60)


def test_models_beyond_the_memory_rest_on_disk_and_go_on_as_if_they_had_not(
    limited: Running, client: Any, connect: Callable[..., Any]
):
    def train(of: Any) -> list[Any]:
        runs = [
            of.create_lora_training_client("base", rank=rank, seed=rank).result() for rank in (1, 4)
        ]
        found: list[Any] = []
        for _ in range(3):
            for run in runs:
                found.append(run.forward_backward([datum(ROW)], "cross_entropy").result().metrics)
                run.optim_step(ADAM).result()
        return found

    memory = service_of(limited).memory
    rests = memory.rests
    assert train(client) == train(connect())  # which has room for both
    assert memory.rests >= rests + 5
    assert memory.in_memory == 1


def test_an_adapter_that_has_no_room_in_memory_even_alone_is_refused_before_it_is_made(
    limited: Running, client: Any
):
    before = service_of(limited).memory.in_memory
    with pytest.raises(tinker.RequestFailedError, match="take a lower rank") as refused:
        client.create_lora_training_client("base", rank=1024).result(timeout=30)
    assert refused.value.category == types.RequestErrorCategory.User
    assert service_of(limited).memory.in_memory == before
    # What is reckoned is what an adapter takes.
    run = client.create_lora_training_client("base", rank=4).result()
    resident = limited.engine.resident
    made = service_of(limited)._runs[run.get_info().model_id].adapter
    size = 4 * sum(t.numel() * 4 for t in resident.trained(made).values())
    with pytest.raises(tinker.RequestFailedError, match=f"takes {256 * size:,} bytes"):
        client.create_lora_training_client("base", rank=1024).result(timeout=30)


@pytest.mark.parametrize("rank", [0, -1, 1025, 10**20])
def test_a_rank_that_no_adapter_has_is_refused_at_once(limited: Running, rank: int):
    key = {"X-API-Key": "tml-rank"}
    session = limited.post("/api/v1/create_session", {}, headers=key).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": "base"}
    answer = limited.post(
        "/api/v1/create_model", body | {"lora_config": {"rank": rank}}, headers=key
    )
    assert answer.status_code == 422
    assert "rank" in answer.json()["error"]["message"]
    answer = limited.post(
        "/api/v1/create_model", body | {"user_metadata": {"a": "x" * 20_000}}, headers=key
    )
    assert answer.status_code == 422
    assert "metadata may have" in answer.json()["error"]["message"]


def test_saves_and_samples_of_a_model_that_rests_leave_its_gradients_as_they_are(
    limited: Running, client: Any
):
    more = tinker.ServiceClient(base_url=limited.url, api_key="tml-more")

    def train(disturbed: bool) -> Any:
        run = client.create_lora_training_client("base", rank=3, seed=5).result()
        run.forward_backward([datum(ROW)], "cross_entropy").result()
        if disturbed:  # the gradients wait on disk meanwhile, as another takes all the memory
            other = more.create_lora_training_client("base", rank=4, seed=6).result()
            other.forward_backward([datum(ROW)], "cross_entropy").result()
            sampler = run.save_weights_and_get_sampling_client().result()
            other.optim_step(ADAM).result()
            params = types.SamplingParams(max_tokens=2)
            sampler.sample(types.ModelInput.from_ints(ROW), 1, params).result()
            client.create_rest_client().list_training_runs().result()
        run.optim_step(ADAM).result()
        return run.forward([datum(ROW)], "cross_entropy").result().metrics

    with more:
        plain = train(disturbed=False)
        assert plain == train(disturbed=True)


def test_a_client_that_was_killed_leaves_nothing_in_memory_for_ever(limited: Running, gone: Any):
    service = service_of(limited)
    run = gone.create_lora_training_client("base", rank=1).result()
    run.save_weights_and_get_sampling_client().result()
    model_id = run.get_info().model_id
    session_id = model_id.partition(":")[0]
    key = {"X-API-Key": "tml-gone"}
    waits = {"model_id": model_id, "seq_id": 77, "adam_params": {}}
    limited.post("/api/v1/optim_step", waits, headers=key)
    owner = service.store.run(model_id).owner
    assert service.quotas.disk.used()[owner] > 0
    vanish(gone)
    service.sessions._sessions[session_id].seen -= 2 * 3600  # as if it had been silent for so long
    service._tidied -= 3600
    asyncio.run_coroutine_threadsafe(service.tidy(), limited.server._loop).result(30)
    assert limited.http.get(f"/api/v1/sessions/{session_id}", headers=key).status_code == 404
    assert model_id not in service._runs
    assert service.quotas.disk.used()[owner] == 0
    assert limited.post("/api/v1/get_info", {"model_id": model_id}, headers=key).status_code == 404


def test_a_client_that_vanishes_or_floods_leaves_others_their_share(flood: Any, client: Any):
    flooding = flood.create_lora_training_client("base", rank=1, train_unembed=False).result()
    ended = threading.Event()

    def go_on() -> None:
        waiting: list[Any] = []
        while not ended.is_set():
            waiting.append(flooding.forward_backward([datum(ROW * 10)] * 5, "cross_entropy"))
            if len(waiting) > 8:
                waiting.pop(0).result(timeout=60)
        for one in waiting:
            one.result(timeout=60)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        run = client.create_lora_training_client("base", rank=1, train_unembed=False).result()
        begun = time.monotonic()
        for _ in range(3):
            run.forward_backward([datum(ROW)], "cross_entropy").result(timeout=30)
            run.optim_step(ADAM).result(timeout=30)
        assert time.monotonic() - begun < 20
    finally:
        ended.set()
        thread.join(120)
    assert not thread.is_alive()
