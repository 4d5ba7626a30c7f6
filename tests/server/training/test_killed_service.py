"""A service that is killed loses what was not saved, and ends in its time when it is told to."""

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from killed_server import KilledServer
from safetensors.torch import load_file
from sdk_rows import datum, logprobs, lost_client
from tinker import types

from matrix import few

RANKS = (1, 2, 4, 8)
SECONDS = 20.0
"""How long a client waits for a result."""
ADAM = types.AdamParams(learning_rate=1e-2, eps=1e-8)


def rows(rank: int) -> list[Any]:
    return [datum([(rank * 31 + 5 * i + j * j) % 250 for j in range(8)]) for i in range(2)]


def step(run: Any, rank: int) -> None:
    run.forward_backward(rows(rank), "cross_entropy")
    run.optim_step(ADAM).result(timeout=SECONDS)


def state_of(run: Any, rank: int) -> list[float]:
    result = run.forward(rows(rank)[:1], "cross_entropy").result(timeout=SECONDS)
    found: list[float] = logprobs(result)[0].tolist()
    return found


class Client(threading.Thread):
    """Trains, and saves after every step, until something fails.

    Attributes:
        saved: paths that the service has promised, with the steps that they are behind.
        failure: what ended it, and how long after the last thing that went well.
    """

    def __init__(self, url: str, rank: int, start: tuple[str, int] | None) -> None:
        super().__init__(daemon=True)
        self.url, self.rank, self.start_at = url, rank, start
        self.saved: list[tuple[str, int]] = []
        self.failure: tuple[str, float] | None = None

    def run(self) -> None:
        self.well = time.monotonic()
        try:
            with lost_client(self.url, f"tml-{self.rank}") as service:
                self.train(service)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"[:300], time.monotonic() - self.well

    def train(self, service: Any) -> None:
        if self.start_at is None:
            done = 0
            begun = service.create_lora_training_client("base", rank=self.rank, seed=1)
        else:
            path, done = self.start_at
            begun = service.create_training_client_from_state_with_optimizer(path)
        run = begun.result(timeout=SECONDS)
        while True:
            step(run, self.rank)
            done += 1
            name = f"step-{done}" if done % 3 else "last"
            path = run.save_state(name, overwrite=name == "last").result(timeout=SECONDS).path
            self.saved.append((path, done))
            self.well = time.monotonic()


@pytest.fixture
def server(base: Path, tmp_path: Path) -> Iterator[KilledServer]:
    server = KilledServer(base, tmp_path, drain=10)
    yield server
    server.kill()


@pytest.fixture
def opened(server: KilledServer) -> Iterator[ExitStack]:
    """Ends clients before the server ends."""
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("kills", few([1, 8], 1))
def test_killed_at_any_moment_every_checkpoint_loads_and_runs_continue_from_it(
    server: KilledServer, opened: ExitStack, tmp_path: Path, kills: int
):
    moments = random.Random(kills)
    last: dict[int, tuple[str, int] | None] = dict.fromkeys(RANKS)
    server.start()
    for _ in range(kills):
        clients = [Client(server.url, rank, last[rank]) for rank in RANKS]
        for client in clients:
            client.start()
        end = time.monotonic() + 60
        while not all(client.saved for client in clients) and time.monotonic() < end:
            assert all(client.failure is None for client in clients), clients[0].failure
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 1.5))
        server.kill()
        server.start()
        for client in clients:
            client.join(60)
            assert not client.is_alive(), "a client hangs"
            assert client.failure is not None
            assert client.failure[1] < SECONDS + 15, client.failure
            own = dict(client.saved)
            last[client.rank] = max(own.items(), key=lambda item: item[1])
        # Whatever lies there is whole; what was promised is there.
        found = {}
        for folder in tmp_path.glob("runs/*/weights/*"):
            assert not folder.name.startswith("."), "something half-written is left"
            record = json.loads((folder / "checkpoint.json").read_text())
            found[f"tinker://{record['run_id']}/weights/{record['name']}"] = folder
            assert load_file(folder / "adapter_model.safetensors")
            assert load_file(folder / "optimizer.safetensors")
        assert all(path in found for client in clients for path, _ in client.saved)
    assert not any(tmp_path.glob("idle/*"))
    assert not any(tmp_path.glob("samplers/*"))

    for rank, kept in last.items():
        assert kept is not None
        path, done = kept
        key = f"tml-{rank}"
        rest = tinker.RestClient(base_url=server.url, api_key=key)
        listed = rest.list_user_checkpoints(limit=500).result(timeout=SECONDS).checkpoints
        assert path in [one.tinker_path for one in listed]
        service = opened.enter_context(lost_client(server.url, key))
        again = service.create_training_client_from_state_with_optimizer(path).result()
        fresh = service.create_lora_training_client("base", rank=rank, seed=1).result()
        for _ in range(done):
            step(fresh, rank)
        # The file may be of a save that ended as the server did: of the same run, a step later.
        steps = done
        while state_of(again, rank) != pytest.approx(state_of(fresh, rank), abs=1e-5):
            assert steps < done + 3, "it is no state of this run"
            step(fresh, rank)
            steps += 1
        step(again, rank)
        step(fresh, rank)
        assert state_of(again, rank) == pytest.approx(state_of(fresh, rank), abs=1e-5)


def test_told_to_end_it_ends_and_everyone_who_polls_is_answered(
    server: KilledServer, opened: ExitStack
):
    server.start()
    client = opened.enter_context(lost_client(server.url, "tml-x"))
    run = client.create_lora_training_client("base", rank=1, seed=1).result()
    model_id = run.get_info().model_id
    begun = run.forward_backward(rows(1) * 64, "cross_entropy")
    key = {"X-API-Key": "tml-x"}
    # Its predecessor never comes: a poll of it would be held for minutes.
    asked = {"model_id": model_id, "seq_id": 9, "adam_params": {}}
    hole = httpx.post(f"{server.url}/api/v1/optim_step", json=asked, headers=key).json()
    answers: list[Any] = []

    def poll() -> None:
        url = f"{server.url}/api/v1/retrieve_future"
        answers.append(httpx.post(url, json=hole, headers=key, timeout=60).json())

    thread = threading.Thread(target=poll)
    thread.start()
    time.sleep(0.3)
    told = time.monotonic()
    server.signal(signal.SIGINT)
    thread.join(30)
    assert answers
    assert answers[0]["category"] == "server"
    assert "the server ends" in answers[0]["error"]
    assert len(begun.result(timeout=SECONDS).loss_fn_outputs) == 128  # it was under way
    server.process.join(30)
    assert not server.process.is_alive()
    assert server.process.exitcode == 0
    assert time.monotonic() - told < 15
    with pytest.raises((tinker.APIError, TimeoutError, ValueError)):
        run.forward(rows(1), "cross_entropy").result(timeout=2)
