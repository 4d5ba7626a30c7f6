"""Adapters in training within a bound of memory: those that rest on disk come back bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit import LoraConfig
from lorakit.engine.adapter_memory import AdapterMemory
from lorakit.engine.adapter_optimizer import AdamW
from lorakit.engine.fair_share import FairQueue
from lorakit.engine.resident import ResidentModel
from lorakit.engine.token_losses import AdapterRow, cross_entropy
from lorakit.engine.training_queue import TrainingQueue
from lorakit.errors import LorakitError

CONFIG = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.3)
NAMES = ["one", "two", "three"]


def resident(tiny_model: Path, dtype: str = "float32") -> ResidentModel:
    return ResidentModel(lorakit.load_model(str(tiny_model), dtype)[0], stays_wrapped=True)


def trained(tiny_model: Path, folder: Path, limit: int, dtype: str) -> tuple[Any, AdapterMemory]:
    """Three adapters that take turns: passes, steps, and gradients that are left over."""
    model = resident(tiny_model, dtype)
    queue = TrainingQueue(model)
    memory = queue.memory = AdapterMemory(model, folder, limit)
    for name in NAMES:
        queue.call(name, lambda name=name: (model.create(name, CONFIG, 3), memory.added(name)))
    while queue.waiting():
        queue.tick()
    for step in range(3):
        for place, name in enumerate(NAMES):
            ids = [(7 * place + step + i * i) % 200 for i in range(9)]
            queue.forward_backward(name, [AdapterRow(name, ids, ids)], cross_entropy)
            while queue.waiting():  # one at a time: each of them makes the others leave
                queue.tick()
            if step < 2:
                queue.call(name, lambda name=name: model.optim_step(name, AdamW(1e-2)))
    while queue.waiting():
        queue.tick()
    state = {}
    for name in NAMES:
        memory.bring(name)
        optimizer = model.optimizer(name)
        assert optimizer is not None
        for key, tensor in model.trained(name).items():
            assert tensor.grad is not None
            moments = optimizer.state[tensor]
            state[name, key] = [tensor.detach().clone(), tensor.grad, *moments.values()]
    return state, memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_that_rest_in_turn_end_with_the_bits_of_those_that_never_do(
    tiny_model: Path, tmp_path: Path, dtype: str
):
    wanted, free = trained(tiny_model, tmp_path / "free", 1 << 40, dtype)
    assert free.rests == 0
    found, tight = trained(tiny_model, tmp_path / "tight", 1, dtype)
    assert tight.rests > 6
    assert tight.in_memory == 1
    assert tight.on_disk == 2
    assert sorted(tight._resting) == sorted(f.stem for f in (tmp_path / "tight").iterdir())
    for key, values in wanted.items():
        for one, other in zip(values, found[key], strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), key


def test_tenants_that_do_not_fit_together_take_turns_and_all_come_to_their_end(
    tiny_model: Path, tmp_path: Path
):
    model = resident(tiny_model)
    queue = TrainingQueue(model)
    model.create("size", CONFIG)
    memory = queue.memory = AdapterMemory(model, tmp_path, 1 << 40)
    memory.added("size")
    memory._limit = 2 * memory.bytes + 1  # two of four
    memory.remove("size")
    for name in (*NAMES, "four"):
        model.create(name, CONFIG)
        memory.added(name)
    ids = [1, 2, 3, 4]
    waits = [
        queue.forward_backward(name, [AdapterRow(name, ids, ids)] * 40, cross_entropy)
        for name in (*NAMES, "four")
    ]
    while queue.waiting():
        queue.tick()
        assert memory.in_memory <= 2
    assert all(len(one.result(0).losses) == 40 for one in waits)
    assert queue.shared


def test_an_adapter_that_cannot_be_read_back_fails_its_own_tenant_alone(
    tiny_model: Path, tmp_path: Path
):
    model = resident(tiny_model)
    queue = TrainingQueue(model)
    memory = queue.memory = AdapterMemory(model, tmp_path, 1)
    for name in NAMES[:2]:
        model.create(name, CONFIG)
        memory.added(name)
    (tmp_path / "one.safetensors").write_bytes(b"broken")
    row = [1, 2, 3]
    bad = queue.forward_backward("one", [AdapterRow("one", row, row)], cross_entropy)
    good = queue.forward_backward("two", [AdapterRow("two", row, row)], cross_entropy)
    while queue.waiting():
        queue.tick()
    assert isinstance(bad.exception(0), LorakitError)
    assert good.result(0).losses


def test_an_adapter_stays_as_it_was_where_another_cannot_take_its_place(
    tiny_model: Path, tmp_path: Path
):
    model = resident(tiny_model)
    memory = AdapterMemory(model, tmp_path / "idle", 1 << 40)
    model.create("one", CONFIG, 3)
    memory.added("one")
    model.forward_backward([AdapterRow("one", [1, 2, 3], [1, 2, 3])])
    model.optim_step("one", AdamW(1e-2))
    before = {key: tensor.detach().clone() for key, tensor in model.trained("one").items()}
    model.save("one", tmp_path / "saved")
    (tmp_path / "saved" / "optimizer.safetensors").write_bytes(b"broken")
    with pytest.raises(Exception, match=r"[Hh]eader|safetensors|deserializ"):
        memory.replace("one", lambda: model.load("one", tmp_path / "saved"))
    assert all(torch.equal(before[key], t) for key, t in model.trained("one").items())
    optimizer = model.optimizer("one")
    assert optimizer is not None
    assert len(optimizer.state) == len(before)
    (tmp_path / "saved" / "optimizer.safetensors").unlink()
    memory.replace("one", lambda: model.load("one", tmp_path / "saved"))
    assert model.optimizer("one") is None
    assert memory.in_memory == 1
    assert not any((tmp_path / "idle").iterdir())


def test_an_owner_with_many_tenants_and_rows_gets_as_many_tokens_as_another(tiny_model: Path):
    model = resident(tiny_model)
    queue = TrainingQueue(model, pass_tokens=64)
    crowd = [f"crowd-{i}" for i in range(6)]
    for name in (*crowd, "single"):
        model.create(name, LoraConfig(r=1, target_modules=["q_proj"]))
    ids = [*range(16)]
    for name in crowd:
        many = [AdapterRow(name, ids, ids)] * 30
        queue.forward_backward(name, many, cross_entropy, owner="many")
    queue.tick()  # they were there before
    own = [AdapterRow("single", ids, ids)] * 20
    soon = queue.forward_backward("single", own, cross_entropy, owner="few")
    scored = queue.call("prompt", lambda: 1, owner="scores", tokens=32)
    before, ticks = queue.tokens["many"], 0
    while not soon.done():
        queue.tick()
        ticks += 1
    assert scored.result(0) == 1
    assert queue.tokens["few"] == 320
    assert queue.tokens["many"] - before <= 320 + 2 * 64
    assert ticks <= 12


def test_a_long_row_neither_keeps_others_out_nor_is_kept_out(tiny_model: Path):
    model = resident(tiny_model)
    queue = TrainingQueue(model, pass_tokens=32)
    for name in ("long", "short"):
        model.create(name, LoraConfig(r=1, target_modules=["q_proj"]))
    ids = [*range(48)]  # more than a pass takes
    long = queue.forward_backward("long", [AdapterRow("long", ids, ids)] * 4, cross_entropy)
    ids = ids[:8]
    short = queue.forward_backward("short", [AdapterRow("short", ids, ids)] * 40, cross_entropy)
    done: list[tuple[int, int]] = []
    while queue.waiting():
        queue.tick()
        done.append((queue.tokens.get("long", 0), queue.tokens.get("short", 0)))
    assert max(abs(a - b) for a, b in done[: len(done) // 2]) <= 48 + 32
    assert long.done()
    assert short.done()


def test_waiting_requests_are_taken_by_owner():
    queue: FairQueue[str] = FairQueue()
    for number in range(5):
        queue.push(f"a{number}", "a", 100)
    queue.push("b0", "b", 10)
    queue.push("b1", "b", 10)
    order = [queue.pop() for _ in range(4)]
    assert order[:1] == ["a0"]
    assert order[1:3] == ["b0", "b1"]
    queue.push("late", "c", 1)
    assert len(queue) == 4
    assert queue.pop() in ("late", "a2")
    queue.keep(lambda item: item == "late")
    assert queue.items() in (["late"], [])
