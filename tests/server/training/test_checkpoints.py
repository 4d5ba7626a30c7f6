"""Saved weights: trained on as if undisturbed, there after a restart, gone when they expire."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinker
from sdk_rows import datum, logprobs
from tinker import types

from lorakit.adapters.open import open_adapter
from lorakit.server.options import ServerOptions
from served import Running, running

ROWS = [datum([(5 * i + j * j) % 250 for j in range(8)]) for i in range(3)]
ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)


def step(run: Any) -> None:
    run.forward_backward(ROWS, "cross_entropy").result()
    run.optim_step(ADAM).result()


def state_of(run: Any) -> list[float]:
    found: list[float] = logprobs(run.forward(ROWS[:1], "cross_entropy").result())[0].tolist()
    return found


def test_a_run_goes_on_from_its_weights_and_optimizer_as_if_it_had_not_stopped(client: Any):
    run = client.create_lora_training_client("base", rank=3, seed=8).result()
    step(run)
    step(run)
    path = run.save_state("two").result().path
    step(run)
    wanted = state_of(run)
    again = client.create_training_client_from_state_with_optimizer(path).result()
    step(again)
    assert state_of(again) == pytest.approx(wanted, abs=1e-6)
    fresh = client.create_training_client_from_state(path).result()
    step(fresh)  # without Adam's state the step is another one
    assert state_of(fresh) != pytest.approx(wanted, abs=1e-6)
    run.load_state_with_optimizer(path).result()
    step(run)
    assert state_of(run) == pytest.approx(wanted, abs=1e-6)


def test_saved_runs_are_listed_and_go_on_after_a_restart_and_other_verbs_take_them(
    base: Path, tmp_path: Path
):
    def serving() -> Any:
        return running(base, {}, ServerOptions(port=0, training_state=tmp_path), max_rows=2)

    def connected(server: Running) -> Any:
        return tinker.ServiceClient(base_url=server.url, api_key="tml-local")

    with serving() as server, connected(server) as client:
        run = client.create_lora_training_client("base", rank=2, seed=8).result()
        step(run)
        model_id = run.get_info().model_id
        path = run.save_state("kept").result().path
        step(run)
        wanted = state_of(run)
        run.save_weights_for_sampler("sampled").result()
    with serving() as server, connected(server) as client:
        rest = tinker.RestClient(base_url=server.url, api_key="tml-local")
        [listed] = rest.list_training_runs().result().training_runs
        assert listed.training_run_id == model_id
        assert listed.last_checkpoint.tinker_path == path
        assert listed.last_sampler_checkpoint is not None
        again = client.create_training_client_from_state_with_optimizer(path).result()
        step(again)
        assert state_of(again) == pytest.approx(wanted, abs=1e-6)
    [folder] = tmp_path.glob("runs/*/weights/kept")
    assert open_adapter(folder, base=str(base)).model.peft_config["default"].r == 2


def test_checkpoints_are_named_once_deleted_and_expire(
    connect: Callable[..., Any], service: Running
):
    run = connect("tml-c").create_lora_training_client("base", rank=1).result()
    rest = tinker.RestClient(base_url=service.url, api_key="tml-c")
    model_id = run.get_info().model_id
    path = run.save_state("once").result().path
    with pytest.raises(tinker.RequestFailedError, match="exists already"):
        run.save_state("once").result()
    soon = run.save_state("soon", ttl_seconds=1).result().path
    sampler = run.save_weights_for_sampler("sampler").result().path

    def names() -> set[str]:
        found = rest.list_checkpoints(model_id).result().checkpoints
        return {one.tinker_path for one in found}

    assert {path, sampler} <= names()
    rest.delete_checkpoint_from_tinker_path(path).result()
    rest.set_checkpoint_ttl_from_tinker_path(sampler, 3600).result()
    deadline = 50
    while soon in names() and deadline:
        deadline -= 1
        time.sleep(0.1)
    assert names() == {sampler}
    with pytest.raises(Exception, match="there is no checkpoint"):
        connect("tml-c").create_training_client_from_state(path).result()
    [one] = rest.list_checkpoints(model_id).result().checkpoints
    assert one.expires_at is not None
    assert one.size_bytes > 1000


def test_weights_for_a_sampler_are_trained_on_without_an_optimizer_and_refused_with_one(
    client: Any,
):
    run = client.create_lora_training_client("base", rank=2, seed=8).result()
    step(run)
    path = run.save_weights_for_sampler("to-train").result().path
    again = client.create_training_client_from_state(path).result()
    assert state_of(again) == pytest.approx(state_of(run), abs=1e-6)
    with pytest.raises(tinker.RequestFailedError, match="has no optimizer state"):
        client.create_training_client_from_state_with_optimizer(path).result(timeout=30)
    other = client.create_lora_training_client("base", rank=3).result()
    with pytest.raises(tinker.RequestFailedError, match="is of a model with"):
        other.load_state(path).result(timeout=30)
    step(other)


def test_weights_are_sampled_from_and_when_they_are_overwritten_the_new_ones_are(client: Any):
    run = client.create_lora_training_client("base", rank=2, seed=8).result()
    prompt = types.ModelInput.from_ints([5, 6, 7, 8, 9])

    def scored(path: str) -> list[float]:
        sampler = client.create_sampling_client(model_path=path).result()
        found: list[float] = sampler.compute_logprobs(prompt).result()[1:]
        return found

    step(run)
    path = run.save_state("both").result().path
    sampled = run.save_weights_for_sampler("both").result().path  # the same name, another kind
    first = scored(path)
    assert scored(sampled) == pytest.approx(first, abs=1e-6)
    step(run)
    assert run.save_state("both", overwrite=True).result().path == path
    second = scored(path)
    assert second != pytest.approx(first, abs=1e-4)
    now = run.save_weights_and_get_sampling_client().result().compute_logprobs(prompt).result()
    assert second == pytest.approx(now[1:], abs=1e-6)
    assert scored(sampled) == pytest.approx(first, abs=1e-6)
