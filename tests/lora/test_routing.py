"""Which adapter serves which row, also where rows are repeated, flattened, or computed again."""

import copy

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from families import SIZES, output, wrap
from lorakit import LoraConfig
from lorakit.errors import InputError
from lorakit.lora.routing import Route, Routing


def test_rows_are_numbered_by_adapter_and_repeated_in_place_as_beams_are():
    route = Route(rows=("b", "__base__", "a"))
    assert route.row_names == ("b", "a")
    index = route.row_index(torch.zeros(6, 1), ["a", "b"])
    assert index.tolist() == [1, 1, 2, 2, 0, 0]
    with pytest.raises(ValueError, match="3 names, and a layer got 4 rows"):
        route.row_index(torch.zeros(4, 1), ["a", "b"])


def test_rows_of_one_adapter_are_brought_side_by_side_and_back():
    route = Route(rows=("b", "a", "b"))
    order, inverse = route.order(torch.zeros(6, 1))  # each row twice, as beams are
    assert order.tolist() == [2, 3, 0, 1, 4, 5]
    assert order[inverse].tolist() == [*range(6)]
    assert route.grouped is not None
    assert route.grouped[0].rows == ("a", "b", "b")
    assert Route(rows=("b", "b", "a")).grouped is None


def test_a_route_holds_for_its_block_also_when_that_fails():
    def fail(routing: Routing) -> None:
        with routing.using(Route(shared=("b",))):
            raise ZeroDivisionError

    routing = Routing(Route(shared=("a",)))
    with pytest.raises(ZeroDivisionError):
        fail(routing)
    assert routing.route.shared == ("a",)


@pytest.mark.parametrize("names", [["default"], ["default", "__base__"], ["default"] * 8])
def test_as_many_names_as_rows_are_needed_also_when_they_would_divide_evenly(build, names):
    wrapped = wrap(build())
    ids = torch.randint(0, 40, (4, 5))
    words = f"{len(names)} names for a batch of 4 rows"
    for call in (
        lambda: wrapped(ids, adapter_names=names),
        lambda: wrapped(input_ids=ids, adapter_names=names),
        lambda: wrapped.generate(ids, adapter_names=names, max_new_tokens=1, pad_token_id=0),
    ):
        with pytest.raises(InputError, match=words):
            call()


TARGETS = {
    "llama": ("all-linear", ["embed_tokens", "q_proj"]),
    "gpt2": ("all-linear", ["wte", "c_attn"]),
    "bert": ("all-linear", ["word_embeddings"]),
    "attention": (["attention"], ["head", "attention"]),
    "conv": (["one", "two", "head"], ["look_up", "three", "two", "head"]),
}
KINDS = {
    "plain": ({}, {"use_rslora": True}),
    "dora": ({}, {"use_dora": True}),
    "both dora": ({"use_dora": True}, {"use_dora": True, "lora_alpha": 3}),
    "lora bias": ({"lora_bias": True}, {"use_rslora": True}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TARGETS)
def test_every_familys_rows_are_what_each_gives_alone_with_gradients(
    build, ids, family: str, kind: str
):
    first, second = TARGETS[family]
    fields, other_fields = KINDS[kind]
    wrapped = wrap(build(family), target_modules=first, r=2, **fields)
    torch.manual_seed(5)
    config = LoraConfig(r=5, target_modules=second, init_lora_weights=False, **other_fields)
    wrapped.add_adapter("other", config)
    names = ["other", "__base__", "default"]
    wrapped.set_adapter(["default", "other"])
    mixed = output(wrapped, ids, adapter_names=names)
    mixed.square().sum().backward()
    found = {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad()
    for i, name in enumerate(names):
        alone = output(wrapped, ids[i : i + 1], adapter_names=[name])
        torch.testing.assert_close(alone[0], mixed[i], rtol=0, atol=1e-10)
        wrapped.set_adapter([] if name == "__base__" else name)
        shared = output(wrapped, ids[i : i + 1])
        torch.testing.assert_close(shared[0], mixed[i], rtol=0, atol=1e-10)
        if name != "__base__":
            shared.square().sum().backward()
    expected = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient - found[name]).abs().max() / (1 + gradient.abs().max()) < 1e-10, name


@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize("way", ["rows", "switched before the backward pass"])
def test_what_checkpointing_computes_again_takes_the_route_of_the_first_time(
    build, ids, wrapped_first: bool, way: str
):
    base = build()
    if not wrapped_first:
        base.activation_checkpointing_enable()
    model = wrap(base, target_modules=["q_proj"], r=3)
    torch.manual_seed(5)
    model.add_adapter("other", LoraConfig(target_modules="all-linear", init_lora_weights=False))
    plain = copy.deepcopy(model)
    plain.base_model.model.activation_checkpointing_disable()
    if wrapped_first:
        model.gradient_checkpointing_enable()
    gradients = []
    for each in (plain, model):
        each.set_adapter(["default", "other"])
        each.train()
        rows = ["other", "__base__", "default"] if way == "rows" else None
        loss = output(each, ids, adapter_names=rows).square().sum()
        each.routing.route = Route()
        loss.backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 10
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_reentrant_checkpointing_trains_one_adapter_and_refuses_rows(build, ids):
    gradients = []
    for options in (None, {"use_reentrant": True}):
        wrapped = wrap(build()).train()
        if options:
            wrapped.gradient_checkpointing_enable(options)
        output(wrapped, ids).square().sum().backward()
        gradients.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
    with pytest.raises(InputError, match="use_reentrant=True"):
        output(wrapped, ids, adapter_names=["default"] * len(ids))


class Tiled(nn.Module):
    """Gives its layer several copies of all tokens, one after the other, as Llama 4's experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x.flatten(0, 1).repeat(2, 1))
        return y.view(2, *x.shape).sum(0)


def test_rows_that_cannot_be_told_apart_inside_the_model_are_refused():
    wrapped = wrap(Tiled(), target_modules=["layer"])
    x = torch.randn(3, 5, 4)
    wrapped(x)
    with pytest.raises(InputError, match="cannot be told whose they are"):
        wrapped(x, adapter_names=["default", "__base__", "default"])


def test_disabling_goes_before_rows(build, ids):
    base = build()
    expected = output(base, ids)
    wrapped = wrap(base)
    names = ["default"] * len(ids)
    with wrapped.disable_adapter():
        assert torch.equal(output(wrapped, ids, adapter_names=names), expected)
    wrapped.disable_adapter_layers()
    assert wrapped.active_adapters == ["default"]
    assert torch.equal(output(wrapped, ids), expected)
    wrapped.enable_adapter_layers()
    assert not torch.equal(output(wrapped, ids), expected)


def test_embeddings_that_are_scaled_are_scaled_with_their_adapter(ids):
    torch.manual_seed(0)
    sizes = SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes)).double().eval()
    wrapped = wrap(model, target_modules=["embed_tokens"])
    expected = output(wrapped, ids)
    rows = output(wrapped, ids, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(rows[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-10)
    wrapped.merge_adapter()
    torch.testing.assert_close(output(wrapped, ids), expected, rtol=0, atol=1e-10)


def test_rows_drop_at_their_own_adapters_rate():
    model = nn.Sequential(nn.Linear(4, 4)).double()
    wrapped = wrap(model, target_modules=["0"], lora_dropout=0.5)
    wrapped.add_adapter("dry", LoraConfig(target_modules=["0"], init_lora_weights=False))
    x = torch.ones(2, 500, 4, dtype=torch.float64)
    y = wrapped.train()(x, adapter_names=["default", "dry"])
    assert y[0].unique(dim=0).shape[0] > 1
    assert y[1].unique(dim=0).shape[0] == 1


def test_rows_go_through_the_saved_module_of_their_own_adapter(build, ids):
    wrapped = wrap(build(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped.add_adapter("other", LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    wrapped.add_adapter("without", LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        for name in ("default", "other"):
            wrapped.lm_head.modules_to_save[name].weight.normal_()
    ids = torch.cat([ids, ids])
    names = ["default", "other", "__base__", "other", "default", "without"]
    mixed = output(wrapped, ids, adapter_names=names)
    for i, name in enumerate(names):
        wrapped.set_adapter([] if name == "__base__" else name)
        torch.testing.assert_close(output(wrapped, ids)[i], mixed[i], rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="one at a time"):
        wrapped.set_adapter(["default", "other"])
