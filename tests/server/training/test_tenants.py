"""Tenants share passes and nothing else: each has what it has alone, and none sees another's."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from sdk_rows import datum, logprobs
from tinker import types

import lorakit
from lorakit import LoraConfig
from lorakit.engine.adapter_optimizer import AdamW
from lorakit.engine.resident import ResidentModel
from lorakit.engine.token_losses import AdapterRow, cross_entropy
from lorakit.engine.training_queue import TrainingQueue
from lorakit.errors import InputError
from served import Running

CONFIGS = {
    "small": LoraConfig(r=1, target_modules=["q_proj", "v_proj"]),
    "middle": LoraConfig(r=8, target_modules="all-linear"),
    "large": LoraConfig(r=32, target_modules=["gate_proj", "up_proj"]),
    "head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "unembed alone": LoraConfig(r=32, target_modules=["lm_head"]),
    "all": LoraConfig(r=1, target_modules=["q_proj", "gate_proj", "lm_head"]),
}


def rows_of(name: str, step: int) -> list[AdapterRow]:
    place = [*CONFIGS].index(name) + 1
    made = []
    for i in range(2 + place):
        ids = [(place * 31 + step * 7 + i * j * 3) % 250 for j in range(5 + 2 * i)]
        made.append(AdapterRow(name, ids, ids))
    return made


def trained(base: Path, names: list[str], pass_tokens: int = 64) -> dict[str, Any]:
    """The tensors of adapters after three steps, whose operations wait for each other."""
    model = lorakit.load_model(str(base), "float32")[0].double()
    queue = TrainingQueue(resident := ResidentModel(model), pass_tokens=pass_tokens)
    for name in names:
        resident.create(name, CONFIGS[name], seed=3)
    for step in range(3):
        for place, name in enumerate(names):
            queue.forward_backward(name, rows_of(name, step), cross_entropy)
            rate = AdamW(learning_rate=1e-2 * (place + 1) if len(names) == 1 else _rate(name))
            queue.call(name, lambda name=name, rate=rate: resident.optim_step(name, rate))
    while queue.waiting():
        queue.tick()
    if len(names) > 1:
        assert queue.shared > 3
    return {name: resident.trained(name) for name in names}


def _rate(name: str) -> float:
    return 1e-2 * ([*CONFIGS].index(name) + 1)


def test_tenants_of_different_ranks_targets_and_rates_together_are_each_alone(base: Path):
    together = trained(base, [*CONFIGS])
    for name in CONFIGS:
        model = lorakit.load_model(str(base), "float32")[0].double()
        resident = ResidentModel(model)
        resident.create(name, CONFIGS[name], seed=3)
        for step in range(3):
            resident.forward_backward(rows_of(name, step))
            resident.optim_step(name, AdamW(learning_rate=_rate(name)))
        for key, tensor in resident.trained(name).items():
            assert torch.allclose(together[name][key], tensor, rtol=0, atol=1e-9), key


def test_a_row_that_cannot_be_computed_fails_its_own_tenant_alone(base: Path):
    queue = TrainingQueue(resident := ResidentModel(lorakit.load_model(str(base), "float32")[0]))
    for name in ("small", "middle"):
        resident.create(name, CONFIGS[name])
    empty = AdapterRow("small", [1, 2, 3], [-100] * 3)
    bad = queue.forward_backward("small", [empty], cross_entropy)
    good = queue.forward_backward("middle", rows_of("middle", 0), cross_entropy)
    queue.tick()
    assert isinstance(bad.exception(0), InputError)
    assert good.result(0).losses
    resident.optim_step("middle", AdamW())
    with pytest.raises(InputError, match="no gradients"):
        resident.optim_step("small", AdamW())


def test_a_tenant_with_many_rows_leaves_each_pass_open_to_others(base: Path):
    queue = TrainingQueue(
        resident := ResidentModel(lorakit.load_model(str(base), "float32")[0]), pass_tokens=64
    )
    for name in ("small", "middle"):
        resident.create(name, CONFIGS[name])
    many = [AdapterRow("small", [*range(16)], [*range(16)])] * 20
    waits = queue.forward_backward("small", many, cross_entropy)
    soon = queue.forward_backward("middle", rows_of("middle", 0)[:2], cross_entropy)
    queue.tick()
    assert soon.done()
    assert not waits.done()
    while queue.waiting():
        queue.tick()
    assert len(waits.result(0).losses) == 20


def test_clients_at_once_have_what_each_has_alone_even_beside_one_that_diverges(
    connect: Callable[..., Any], service: Running
):
    rows = [datum([(7 * i + j * j) % 250 for j in range(9)]) for i in range(3)]

    def train(rank: int, rate: float, found: dict[int, Any]) -> None:
        run = connect().create_lora_training_client("base", rank=rank, seed=4).result()
        try:
            for _ in range(3):
                run.forward_backward(rows, "cross_entropy")
                run.optim_step(types.AdamParams(learning_rate=rate, eps=1e-8)).result()
        except tinker.RequestFailedError as error:
            found[rank] = str(error)
        else:
            found[rank] = logprobs(run.forward(rows[:1], "cross_entropy").result())[0].tolist()

    alone: dict[int, Any] = {}
    for rank in (1, 8):
        train(rank, 1e-2, alone)
    together: dict[int, Any] = {}
    rates = {1: 1e-2, 8: 1e-2, 3: 1e30}
    threads = [threading.Thread(target=train, args=(*each, together)) for each in rates.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank, wanted in alone.items():
        assert together[rank] == pytest.approx(wanted, abs=1e-5)
    assert "NaN or Inf" in together[3]


def test_a_key_sees_and_changes_nothing_of_another_s(connect: Callable[..., Any], service: Running):
    mine, theirs = connect("tml-mine"), connect("tml-theirs")
    run = mine.create_lora_training_client("base", rank=1, user_metadata={"a": "b"}).result()
    info = run.get_info()
    path = run.save_state("kept").result().path
    sampler = run.save_weights_for_sampler("to-sample").result().path
    rest = tinker.RestClient(base_url=service.url, api_key="tml-theirs")
    own = tinker.RestClient(base_url=service.url, api_key="tml-mine")
    assert [r.training_run_id for r in own.list_training_runs().result().training_runs] == [
        info.model_id
    ]
    assert rest.list_training_runs().result().training_runs == []
    assert rest.list_user_checkpoints().result().checkpoints == []
    for refused in (
        lambda: rest.get_training_run(info.model_id).result(),
        lambda: rest.list_checkpoints(info.model_id).result(),
        lambda: rest.delete_checkpoint_from_tinker_path(path).result(),
        lambda: theirs.create_training_client_from_state(path).result(),
        lambda: theirs.create_sampling_client(model_path=sampler).result(),
    ):
        with pytest.raises(Exception, match=r"there is no|404"):
            refused()
    body = {"model_id": info.model_id, "seq_id": 99, "adam_params": {}}
    theirs_key = {"X-API-Key": "tml-theirs"}
    begun = service.post("/api/v1/optim_step", body, headers=theirs_key).json()
    failed = service.post("/api/v1/retrieve_future", begun, headers=theirs_key).json()
    assert failed["category"] == "user"
    assert service.post("/api/v1/get_info", body | {"model_id": "x"}).status_code == 422
    mine_begun = {"request_id": f"{info.model_id}:1"}
    assert (
        service.post("/api/v1/retrieve_future", mine_begun, headers=theirs_key).status_code == 404
    )
    # Published, it may be loaded by others, and changed by its owner alone.
    own.publish_checkpoint_from_tinker_path(path).result()
    theirs.create_training_client_from_state(path).result()
    with pytest.raises(Exception, match=r"there is no|404"):
        rest.unpublish_checkpoint_from_tinker_path(path).result()


def test_openai_s_routes_show_and_serve_a_checkpoint_to_its_owner_alone(
    connect: Callable[..., Any], service: Running
):
    run = connect("tml-mine").create_lora_training_client("base", rank=1).result()
    path = run.save_weights_for_sampler("chatted").result().path
    connect("tml-mine").create_sampling_client(model_path=path).result()
    body = {"model": path, "prompt": "hello", "max_tokens": 2}
    for key, status in (("tml-mine", 200), ("tml-theirs", 404)):
        headers = {"X-API-Key": key}
        listed = service.http.get("/v1/models", headers=headers).text
        answer = service.post("/v1/completions", body, headers=headers)
        assert answer.status_code == status
        assert (path in listed) is (status == 200)
        unknown = service.post("/v1/completions", body | {"model": "x"}, headers=headers)
        assert "sample" not in unknown.text
