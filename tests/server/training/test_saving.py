"""Saving holds up the run's own next save alone, and a file has the weights of its turn."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sdk_rows import datum, logprobs
from tinker import types

from served import Running

ROWS = [datum([5, 6, 7, 8, 9, 60, 61]), datum([3, 1, 4, 1, 5])]
SECONDS = 30.0


def step(run: Any) -> None:
    run.forward_backward(ROWS, "cross_entropy")
    run.optim_step(types.AdamParams(learning_rate=3e-2)).result(timeout=SECONDS)


def state_of(run: Any) -> list[float]:
    result = run.forward(ROWS[:1], "cross_entropy").result(timeout=SECONDS)
    found: list[float] = logprobs(result)[0].tolist()
    return found


def test_a_slow_disk_holds_up_no_step_and_files_have_the_weights_of_their_turns(
    connect: Callable[..., Any], service: Running, monkeypatch: pytest.MonkeyPatch
):
    app: Any = service.server.config.app
    store = app.state.training._service.store
    may_write, save = threading.Event(), store.save

    def slowly(*given: Any) -> None:
        assert may_write.wait(SECONDS)
        save(*given)

    monkeypatch.setattr(store, "save", slowly)
    client = connect("tml-saving")
    run = client.create_lora_training_client("base", rank=2, seed=3).result()
    other = connect("tml-other").create_lora_training_client("base", rank=1, seed=4).result()
    step(run)
    early = state_of(run)
    first = run.save_state("first")
    step(run)  # behind the save, and not held up by the disk
    step(other)
    late = state_of(run)
    second = run.save_state("first", overwrite=True)
    behind = run.optim_step(types.AdamParams())
    third = other.save_weights_for_sampler("mine")
    step(other)
    assert not any(one.future().done() for one in (first, second, behind, third))
    sampler = other.save_weights_and_get_sampling_client()  # waits for the save before it
    may_write.set()
    path = first.result(timeout=SECONDS).path
    assert second.result(timeout=SECONDS).path == path  # in their order: the later one is there
    assert third.result(timeout=SECONDS).path
    assert sampler.result(timeout=SECONDS)
    with pytest.raises(Exception, match="has no gradients"):
        behind.result(timeout=SECONDS)
    again = client.create_training_client_from_state_with_optimizer(path).result()
    assert state_of(again) == pytest.approx(late, abs=1e-6)
    assert late != pytest.approx(early, abs=1e-3)
    step(run)
    step(again)
    assert state_of(again) == pytest.approx(state_of(run), abs=1e-6)
