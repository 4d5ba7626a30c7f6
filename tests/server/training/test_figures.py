"""What the service tells of itself: counts by key without the key, and a log without contents."""

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from sdk_rows import datum
from tinker import types

from lorakit.server.options import ApiKey, ServerOptions
from lorakit.server.training.history import History, read_history
from lorakit.server.training.wire import Datum
from served import Running, running

ANN, BOB, ADMIN = "tml-ann-7f31", "tml-bob-9c02", "tml-admin-55aa"
ROW = [17, 23, 42, 66, 71, 88, 93, 104]


@pytest.fixture(scope="module")
def keyed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    options = ServerOptions(
        port=0,
        api_keys=(ApiKey(ANN, "ann"), ApiKey(BOB)),
        admin_key=ADMIN,
        training_state=tmp_path_factory.mktemp("keyed"),
    )
    with running(base, {}, options, max_rows=2) as server:
        yield server


def figures(server: Running, key: str) -> dict[str, float]:
    text = server.http.get("/metrics", headers={"X-API-Key": key}).text
    assert ANN not in text
    assert BOB not in text
    lines = [line for line in text.splitlines() if line.startswith("lorakit_")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def work(client: Any) -> None:
    run = client.create_lora_training_client("base", rank=2).result()
    run.forward_backward([datum(ROW)], "cross_entropy").result()
    run.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    run.save_state("kept").result()
    sampler = run.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=3, stop=[])
    sampler.sample(types.ModelInput.from_ints(ROW), 2, params).result()


def test_tokens_are_counted_by_key_and_shown_to_the_key_and_the_admin(keyed: Running):
    with ExitStack() as stack:
        for key in (ANN, BOB):
            work(stack.enter_context(tinker.ServiceClient(base_url=keyed.url, api_key=key)))
        every, own = figures(keyed, ADMIN), figures(keyed, ANN)
    trained = {name: value for name, value in every.items() if "trained_tokens_total" in name}
    [other] = [re.findall(r'key="(\w+)"', name)[0] for name in trained if "ann" not in name]
    assert re.fullmatch(r"[0-9a-f]{8}", other)
    for label in ("ann", other):
        assert every[f'lorakit_trained_tokens_total{{key="{label}"}}'] == 7
        assert every[f'lorakit_sampled_tokens_total{{key="{label}"}}'] == 6
        assert every[f'lorakit_checkpoint_bytes{{key="{label}"}}'] > 1000
    assert every["lorakit_training_passes_total"] >= 2
    assert every["lorakit_training_passes_shared_total"] >= 0
    assert every["lorakit_training_queue_tokens"] == 0
    assert every["lorakit_training_queue_operations"] == 0
    assert every["lorakit_training_models"] == 2
    assert every["lorakit_training_adapters_in_memory"] == 2
    assert own['lorakit_trained_tokens_total{key="ann"}'] == 7
    assert not [name for name in own if other in name]


def test_the_log_tells_who_does_what_without_keys_and_without_contents(
    keyed: Running, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.DEBUG):
        client = tinker.ServiceClient(base_url=keyed.url, api_key=ANN)
        work(client)
        run = client.create_lora_training_client("base", rank=1).result()
        with pytest.raises(tinker.RequestFailedError):
            run.forward_backward([datum([*ROW, 99999])], "cross_entropy").result()
        client.close("success").result()
    own = [r for r in caplog.records if r.name.startswith(("lorakit", "uvicorn", "asyncio"))]
    said = "\n".join(record.getMessage() for record in own)
    assert "of ann begins" in said
    assert "/weights/kept is saved" in said
    assert "ends" in said
    assert ANN not in said
    for tokens in (ROW, [99999]):
        assert ", ".join(map(str, tokens)) not in said


def test_a_history_has_the_mean_loss_of_each_step_and_survives_a_line_that_was_cut_off(
    tmp_path: Path,
):
    path = tmp_path / "history.jsonl"
    history = History(path)
    weights = {"weights": np.array([1.0, 0.0, -1.0])}
    history.passed([Datum([1, 2, 3], weights), Datum([4, 5], {})], 8.0)
    history.passed([Datum([1], {})], 2.0)
    assert history.stepped(1e-3, 0.5).loss == 2.0  # 10 nats over weights of 5
    assert history.stepped(1e-3, 0.5).loss is None
    history.passed([Datum([1], {})], float("nan"))
    history.stepped(1e-3, 0.5)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [(p.step, p.loss, p.tokens) for p in read_history(path)] == [
        (1, 2.0, 6), (2, None, 0), (3, None, 1),
    ]  # fmt: skip
    for _ in range(2000):
        history.stepped(1e-3, 0.5)
    thinned = read_history(path)
    assert len(thinned) < 800
    assert thinned[-1].step == 2003
