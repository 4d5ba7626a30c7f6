"""A wrapped layer alone: the formula, its gradients, and a bank that merging leaves whole."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorakit import LoraConfig, LoraLinear
from lorakit.lora.kernels import lora_linear
from lorakit.lora.layers import LoraEmbedding
from lorakit.lora.routing import Route, Routing


def random_layer(d_in: int = 6, d_out: int = 5, dtype=torch.float64, **options) -> LoraLinear:
    torch.manual_seed(0)
    base = nn.Linear(d_in, d_out).to(dtype)
    return LoraLinear(base, **{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **options})


def test_a_new_layer_computes_what_its_base_does_and_trains_its_factors_alone():
    base = nn.Linear(6, 5)
    x = torch.randn(2, 6)
    expected = base(x)
    layer = LoraLinear(base, r=4, lora_alpha=8)
    assert torch.equal(layer(x), expected)
    assert layer.scaling["default"] == 2
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A.default.weight", "lora_B.default.weight"}
    frozen = base.weight.clone()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
    layer(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer(x), expected)
    assert torch.equal(base.weight, frozen)


@given(
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    r=st.integers(1, 12),
    alpha=st.floats(0.5, 64),
    shape=st.lists(st.integers(1, 4), max_size=3),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_output_is_that_of_the_formula(d_in, d_out, r, alpha, shape, rslora, dtype):
    layer = random_layer(d_in, d_out, dtype, r=r, lora_alpha=alpha, use_rslora=rslora)
    A, B = layer.factors("default")
    x = torch.randn(*shape, d_in, dtype=dtype)
    scaling = alpha / r**0.5 if rslora else alpha / r
    delta = scaling * B @ A
    expected = F.linear(x, layer.base_layer.weight + delta, layer.base_layer.bias)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {}
    tolerance = close or {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(layer(x), expected, **tolerance)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_function_passes_gradcheck(bias: bool):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    A, B = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (5, 3)))
    W = torch.randn(5, 6, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64) if bias else None
    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, W, b, A, B, 0.7), (x, A, B))


def test_the_fused_function_keeps_only_the_input_and_its_projection():
    layer = random_layer()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()} | {x.data_ptr()}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in own] == [(6, 3)]


def test_in_bfloat16_the_factors_stay_in_float32_and_the_output_in_bfloat16():
    layer = random_layer(64, 64, torch.bfloat16, r=8)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    A, B = layer.factors("default")
    assert A.dtype == B.dtype == torch.float32
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = x.float() @ (layer.base_layer.weight.float() + 0.75 * B @ A).T
    torch.testing.assert_close(
        y.float(), exact + layer.base_layer.bias.float(), rtol=0.05, atol=0.05
    )
    y.sum().backward()
    assert A.grad.dtype == torch.float32


def test_dropout_acts_on_the_adapter_alone_and_only_while_training():
    layer = random_layer(lora_dropout=0.5)
    x = torch.randn(200, 6, dtype=torch.float64)
    plain = layer.eval()(x)
    layer.train()
    torch.manual_seed(1)
    dropped = layer(x)
    assert not torch.allclose(dropped, plain)
    base = layer.base_layer(x)
    mean = torch.stack([layer(x) for _ in range(400)]).mean(0)
    assert (mean - plain).abs().mean() < 0.2 * (plain - base).abs().mean()


def test_merging_a_hundred_times_in_bfloat16_gives_back_the_very_bytes():
    layer = random_layer(32, 32, torch.bfloat16)
    before = layer.base_layer.weight.detach().clone()
    for _ in range(100):
        layer.merge()
        assert layer.merged
        assert not torch.equal(layer.base_layer.weight, before)
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_a_safe_merge_refuses_weights_that_are_not_finite():
    layer = random_layer()
    with torch.no_grad():
        layer.factors("default")[0].fill_(float("inf"))
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rows_with_adapters_of_different_rank_are_what_each_gives_alone(dropout: float):
    layer = random_layer()
    layer.add_adapter("other", LoraConfig(r=7, lora_alpha=3, init_lora_weights=False))
    layer.lora_dropout["other"] = nn.Dropout(dropout)
    layer.eval()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    rows = ("other", "__base__", "default", "other")
    with layer.routing.using(Route(rows=rows)):
        mixed = layer(x)
    for i, name in enumerate(rows):
        shared = () if name == "__base__" else (name,)
        with layer.routing.using(Route(shared=shared)):
            torch.testing.assert_close(mixed[i], layer(x[i : i + 1])[0], rtol=0, atol=1e-12)


def test_an_embedding_follows_the_formula_and_new_ones_change_nothing():
    torch.manual_seed(0)
    base = nn.Embedding(9, 4).double()
    routing = Routing()
    layer = LoraEmbedding(base, routing)
    layer.add_adapter("default", LoraConfig(r=3, lora_alpha=6))
    routing.route = Route(shared=("default",))
    ids = torch.randint(0, 9, (2, 5))
    assert torch.equal(layer(ids), base(ids))
    A, B = layer.factors("default")
    nn.init.normal_(A)
    expected = F.embedding(ids, base.weight + 2 * (B @ A).T)
    torch.testing.assert_close(layer(ids), expected, rtol=0, atol=1e-12)
    layer.merge()
    torch.testing.assert_close(layer(ids), expected, rtol=0, atol=1e-12)


def test_a_layer_can_be_copied_and_pickled():
    layer = random_layer()
    x = torch.randn(2, 6, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        other.routing.route = Route()
        assert not torch.equal(other(x), layer(x))
