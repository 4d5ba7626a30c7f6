"""Adapters whose rows lie next to each other in one batch: each part is what it is alone."""

import copy

import pytest
import torch
from torch import nn

from families import output, wrap
from lorakit import LoraConfig
from lorakit.errors import InputError
from lorakit.lora.routing import BASE, Route
from lorakit.lora.streams import Stream

KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "lora bias": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
}
TARGETS = {
    "llama": (["embed_tokens", "k_proj", "down_proj", "q_proj"], ["q_proj", "down_proj"]),
    "gpt2": (["wte", "c_attn"], ["c_attn", "c_fc"]),
    "conv": (["look_up", "one", "two", "head"], ["three", "two", "head"]),
}


def two_adapters(build, family: str = "llama", **fields) -> nn.Module:
    first, second = TARGETS[family]
    model = wrap(build(family), target_modules=first, r=2, lora_dropout=fields.pop("dropout", 0.0))
    torch.manual_seed(5)
    init = fields.pop("init_lora_weights", False)
    config = LoraConfig(r=5, target_modules=second, init_lora_weights=init, **fields)
    model.add_adapter("other", config)
    model.set_adapter(["default", "other"])
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_parts_of_a_batch_are_what_each_gives_alone_with_gradients(
    build, ids, family: str, kind: str
):
    fields = dict(KINDS[kind])
    if family == "conv" and kind == "pissa":
        fields = {"use_rslora": True}
    model = two_adapters(build, family, **fields)
    names, batches = ("other", BASE, "default"), (ids[:2], ids[:1], ids)
    together = torch.cat(batches)
    model.routing.route = Route(rows=names, sizes=(2, 1, 3), shape=tuple(together.shape))
    output(model, together).square().sum().backward()
    found = gradients(model)
    for name, batch in zip(names, batches, strict=True):
        model.routing.route = Route(shared=() if name == BASE else (name,))
        alone = output(model, batch)
        if name != BASE:
            alone.square().sum().backward()
    expected = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient - found[name]).abs().max() / (1 + gradient.abs().max()) < 1e-10, name


def test_parts_of_a_line_are_cut_by_tokens():
    def cut(route: Route, *shape: int) -> tuple[int, list[int]]:
        dim, parts = route.parts(torch.zeros(*shape))
        assert tuple(dict.fromkeys(part.adapter for part in parts)) == route.row_names
        return dim, [part.size for part in parts]

    line = Route(rows=("a", "b"), sizes=(3, 4), shape=(1, 7))
    assert cut(line, 1, 7, 2) == (1, [3, 4])
    assert cut(line, 7, 2) == (0, [3, 4])
    rows = Route(rows=("a", "b"), sizes=(1, 2), shape=(3, 5))
    assert cut(rows, 3, 5, 2) == (0, [1, 2])
    assert cut(rows, 15, 2) == (0, [5, 10])
    with pytest.raises(InputError, match="a batch of 3 rows or tokens, and a layer got 4"):
        rows.parts(torch.zeros(4, 2))
    neighbours = Route(rows=("a", "a", "b"), shape=(6, 5))  # each row twice, as beams are
    assert cut(neighbours, 6, 5, 2) == (0, [4, 2])
    with pytest.raises(InputError, match="3 names, and a layer got 1"):
        neighbours.parts(torch.zeros(1, 3, 2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_part_draws_its_dropout_as_it_would_alone(build, ids, checkpointing: bool):
    model = two_adapters(build, dropout=0.3, lora_dropout=0.5)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    names, batches = ("other", "default"), (ids[:2], ids)
    streams, states = [], []
    for seed in (7, 8):
        torch.manual_seed(seed)
        streams.append(Stream(torch.device("cpu")))
    torch.manual_seed(9)
    before = torch.get_rng_state()
    together = torch.cat(batches)
    for _ in range(2):  # the streams go on
        model.routing.route = Route(
            rows=names, sizes=(2, 3), shape=tuple(together.shape), streams=tuple(streams)
        )
        output(model, together).square().sum().backward()
    found = gradients(model)
    assert torch.equal(before, torch.get_rng_state()), "PyTorch's own generator has been drawn from"
    for name, batch, seed in zip(names, batches, (7, 8), strict=True):
        torch.manual_seed(seed)
        for _ in range(2):
            model.routing.route = Route(shared=(name,))
            output(model, batch).square().sum().backward()
        states.append(torch.get_rng_state())
    expected = gradients(model)
    for name, gradient in expected.items():
        assert (gradient - found[name]).abs().max() / (1 + gradient.abs().max()) < 1e-10, name
    for stream, state in zip(streams, states, strict=True):
        with stream.drawing():
            assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_that_is_no_number_harms_no_other_part(build, ids):
    model = two_adapters(build)
    healthy = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".other" in name:
                parameter.fill_(torch.nan)
    found = []
    for each in (model, healthy):
        each.routing.route = Route(rows=("other", "default"), sizes=(1, 2), shape=tuple(ids.shape))
        y = output(each, ids)
        y.square().sum().backward()
        found.append({n: g for n, g in gradients(each).items() if ".default" in n} | {"y": y[1:]})
    assert len(found[0]) > 10
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
