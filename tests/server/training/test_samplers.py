"""Samplers that follow the weights, polls for a whole sampling session, and samples called off."""

import asyncio
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tinker
from sdk_rows import datum
from tinker import types

from lorakit.server.training.futures import Promises
from served import Running, until

ROW = [5, 6, 7, 8, 9, 60, 61]
PROMPT = types.ModelInput.from_ints(ROW)
KEY = {"X-API-Key": "tml-local"}


def step(run: Any, rate: float = 5e-2) -> None:
    run.forward_backward([datum(ROW)], "cross_entropy").result()
    run.optim_step(types.AdamParams(learning_rate=rate)).result()


def test_an_inflight_sampler_follows_later_saves_and_a_snapshot_does_not(client: Any):
    run = client.create_lora_training_client("base", rank=2, seed=3).result()
    step(run)
    first = run.save_weights_and_get_sampling_client(kind="inflight").result()
    frozen = run.save_weights_and_get_sampling_client().result()
    before = first.compute_logprobs(PROMPT).result()
    assert frozen.compute_logprobs(PROMPT).result() == before
    step(run)
    assert first.compute_logprobs(PROMPT).result() == before  # until it is published
    second = run.save_weights_and_get_sampling_client(kind="inflight").result()
    after = second.compute_logprobs(PROMPT).result()
    assert after[1:] != pytest.approx(before[1:], abs=1e-3)
    assert first.compute_logprobs(PROMPT).result() == after
    assert frozen.compute_logprobs(PROMPT).result() == before


def test_a_run_can_be_chatted_with_under_its_name_while_it_trains(client: Any, service: Running):
    run = client.create_lora_training_client("base", rank=2, seed=3).result()
    model_id = run.get_info().model_id
    body = {"prompt": "hello", "max_tokens": 3, "temperature": 0, "logprobs": 1}

    def first(model: str) -> float:
        answer = service.post("/v1/completions", body | {"model": model}, headers=KEY)
        assert answer.status_code == 200, answer.text
        found: float = answer.json()["choices"][0]["logprobs"]["token_logprobs"][0]
        return found

    base = first(service.engine.model_name)
    assert first(f"tinker://{model_id}") == pytest.approx(base, abs=1e-5)
    step(run)
    path = run.save_weights_for_sampler("named").result().path
    assert first(f"tinker://{model_id}") == pytest.approx(first(path), abs=1e-6)
    assert first(path) != pytest.approx(base, abs=1e-4)
    start = run.save_state("later").result().path
    step(run)
    assert first(f"tinker://{model_id}") != pytest.approx(first(path), abs=1e-5)
    run.load_state(start).result()
    assert first(f"tinker://{model_id}") == pytest.approx(first(path), abs=1e-6)
    for unknown in (f"tinker://{model_id}x", f"{path}x", "tinker://"):
        answer = service.post("/v1/completions", body | {"model": unknown}, headers=KEY)
        assert answer.status_code == 404


def test_copies_of_a_sampler_have_numbers_of_their_own_and_share_no_results(client: Any):
    run = client.create_lora_training_client("base", rank=1, seed=3).result()
    sampler = run.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=2, seed=1, stop=[])
    wanted = sampler.sample(PROMPT, 1, params).result().sequences[0].tokens
    copies = [pickle.loads(pickle.dumps(sampler)) for _ in range(2)]
    begun = [copy.sample(PROMPT, 1, params) for copy in copies for _ in range(3)]
    assert all(one.result(timeout=60).sequences[0].tokens == wanted for one in begun)


def test_one_poll_serves_a_whole_session(service: Running, client: Any):
    sampler = client.create_sampling_client(base_model="base")
    params = types.SamplingParams(max_tokens=2, stop=[])
    before = service.figure('lorakit_requests_total{route="/api/v1/retrieve_future"')
    begun = [sampler.sample(PROMPT, 1, params) for _ in range(40)]
    assert all(one.result(timeout=60).sequences for one in begun)
    # Each result is fetched once, and nobody asks for one that is not there yet.
    after = service.figure('lorakit_requests_total{route="/api/v1/retrieve_future"')
    assert after - before == 40


def test_a_sample_that_is_given_up_frees_its_row(service: Running, client: Any):
    sampler = client.create_sampling_client(base_model="base")
    params = types.SamplingParams(max_tokens=3000, stop=[])
    name = 'lorakit_requests_total{route="/api/v1/asample"'
    before = service.figure(name)
    begun = [sampler.sample(PROMPT, 1, params) for _ in range(6)]
    until(lambda: service.figure(name) == before + 6)
    time.sleep(0.5)  # until the clients know what they may call off
    assert service.engine.running() > 0
    for one in begun:
        one.future().cancel()
    until(lambda: service.engine.running() == 0 and service.engine.waiting() == 0, 20)


def test_results_of_a_session_come_in_order_and_are_forgotten_when_they_were_fetched():
    async def told() -> None:
        promises, may_end = Promises(), {name: asyncio.Event() for name in "abc"}

        async def work(name: str = "") -> dict[str, Any]:
            if name:
                await may_end[name].wait()
            if name == "c":
                raise ValueError("no")
            return {}

        for name in may_end:
            promises.open(name, "me", work(name), "group")
        promises.open("d", "me", work(), "other")
        promises.open("e", "you", work(), "group")
        may_end["b"].set()
        first = await promises.ended("me", "group", 0)
        assert [p.request_id for p in first] == ["b"]
        assert promises.under_way("me") == 2
        may_end["c"].set()
        rest = await promises.ended("me", "group", first[-1].number)
        assert [(p.request_id, p.failed) for p in rest] == [("c", True)]
        begun = time.monotonic()
        assert await promises.ended("me", "none", 0, 0.05) == []
        assert time.monotonic() - begun < 10
        may_end["a"].set()
        assert [p.request_id for p in await promises.ended("me", "group", rest[-1].number)] == ["a"]
        both = await promises.ended("me", "group", first[-1].number)
        assert [p.request_id for p in both] == ["c", "a"]
        promises.drop("you", ["a", "b"])
        assert promises.find("a", "me") is not None
        promises.drop("me", ["a", "b"])
        assert promises.find("a", "me") is None
        # Another's request of the same id is another request.
        mine = promises.open("x", "me", work())
        assert promises.open("x", "you", work()) is not mine
        assert promises.open("x", "me", work()) is mine
        promises.cancel_all("over")
        assert await promises.poll(promises.open("y", "me", work())) == {}

    with ThreadPoolExecutor(1) as thread:  # this one may have an event loop, a browser's
        thread.submit(asyncio.run, told()).result(60)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "copy_weights"), ("GET", "audit"), ("GET", "sessions/x/trace_export")],
)
def test_what_is_not_offered_is_refused_by_name_at_once(service: Running, method: str, path: str):
    answer = service.http.request(method, f"/api/v1/{path}", headers=KEY, json={})
    assert answer.status_code == 400  # which no client repeats
    assert "is not offered here" in answer.json()["error"]["message"]


def test_the_sdk_is_told_so_too(connect: Callable[..., Any]):
    rest = connect().create_rest_client()
    with pytest.raises(tinker.BadRequestError, match="not offered"):
        rest.export_session_trace("x").result(timeout=30)


def test_answers_under_way_keep_their_weights_while_others_come_and_go(
    client: Any, connect: Callable[..., Any]
):
    run = client.create_lora_training_client("base", rank=2, seed=3).result()
    step(run)
    sampler = run.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=120, temperature=0, stop=[])
    wanted = sampler.sample(PROMPT, 1, params).result().sequences[0].tokens
    begun = [sampler.sample(PROMPT, 1, params) for _ in range(4)]
    other = connect("tml-other").create_lora_training_client("base", rank=3, seed=4).result()
    for _ in range(6):  # more adapters than there are rows
        step(other, 0.3)
        short = types.SamplingParams(max_tokens=2, stop=[])
        theirs = other.save_weights_and_get_sampling_client().result()
        theirs.sample(PROMPT, 1, short).result()
    assert all(one.result(timeout=60).sequences[0].tokens == wanted for one in begun)


def test_an_older_snapshot_of_a_run_leaves_the_memory_and_is_read_again_when_asked(
    client: Any, service: Running
):
    run = client.create_lora_training_client("base", rank=2, seed=3).result()
    step(run)
    first = run.save_weights_and_get_sampling_client().result()
    before = first.compute_logprobs(PROMPT).result()
    step(run)
    second = run.save_weights_and_get_sampling_client().result()
    snapshots = [i for i in service.engine.pool.infos() if i.name.startswith(session_of(run))]
    assert [info.loaded for info in snapshots[-2:]] == [False, True]
    assert second.compute_logprobs(PROMPT).result() != before
    assert first.compute_logprobs(PROMPT).result() == before


def session_of(run: Any) -> str:
    """What the names of a run's snapshots begin with."""
    model_id: str = run.get_info().model_id
    return f"{model_id.partition(':')[0]}:sample:"
