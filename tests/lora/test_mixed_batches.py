"""Adapters of different kinds in one batch: each row's output, and gradients, as of it alone."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from families import output, wrap
from lorakit import LoraConfig, LoraModel
from lorakit.lora.layers import LoraQuantizedLinear
from lorakit.lora.routing import BASE, Route


def add(model: LoraModel, kinds: dict[str, dict]) -> None:
    for seed, (name, fields) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        model.add_adapter(name, LoraConfig(**{"init_lora_weights": False, **fields}))
    model.set_adapter(["default", *kinds])


def require_same_as_alone(model: LoraModel, x: torch.Tensor, names: list[str], close: float):
    """Each row, and the sum of the rows' gradients, as when each is computed by itself."""
    mixed = model(x, adapter_names=names)
    mixed = mixed if isinstance(mixed, torch.Tensor) else mixed[0]
    mixed.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rows = []
    for row, name in enumerate(names):
        with model.routing.using(Route(shared=() if name == BASE else (name,))):
            alone = model(x[row : row + 1])
        rows.append(alone if isinstance(alone, torch.Tensor) else alone[0])
        if name != BASE:
            rows[-1].square().sum().backward()
        torch.testing.assert_close(rows[-1][0], mixed[row], rtol=close, atol=close)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient - found[name]).abs().max() / (1 + gradient.abs().max()) < close, name
    different = [row.detach() for row, name in zip(rows, names, strict=True) if name != BASE]
    assert len({tuple(row.flatten().tolist()) for row in different}) == len(different)


def test_adapters_of_convolutions_stand_beside_those_of_linear_layers(build, ids):
    model = wrap(build("conv"), target_modules=["two", "three"], r=2)
    add(
        model,
        {
            "linear": {"target_modules": ["head"], "r": 3},
            "both": {"target_modules": ["one", "head"], "use_dora": True},
            "embedding": {"target_modules": ["look_up", "three"], "use_rslora": True},
        },
    )
    names = ["linear", "default", BASE, "both", "linear", "embedding", "default"]
    x = ids.repeat(3, 1)[:7] + torch.arange(7)[:, None]
    require_same_as_alone(model, x % 40, names, 1e-10)


def test_adapters_of_all_kinds_stand_beside_one_quantised_base():
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    base = nn.Sequential()
    for _ in range(2):
        layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        layer.load_state_dict(linear.state_dict())
        base.extend([layer.to("cpu"), nn.Tanh()])
    model = wrap(base, target_modules="all-linear", r=2)
    assert isinstance(model.get_base_model()[0], LoraQuantizedLinear)
    kinds = {
        "dora": {"use_dora": True, "r": 3},
        "rslora": {"use_rslora": True, "lora_alpha": 3},
        "bias": {"lora_bias": True},
        "one layer": {"target_modules": ["2"]},
    }
    add(model, {name: {"target_modules": ["0", "2"], **kind} for name, kind in kinds.items()})
    x = torch.randn(7, 3, 64)
    names = ["bias", "default", BASE, "dora", "dora", "rslora", "one layer"]
    require_same_as_alone(model, x, names, 1e-5)


@pytest.mark.parametrize("sizes", [None, (2, 1)])
def test_a_layer_whose_adapters_serve_no_row_is_the_base(build, ids, sizes: tuple | None):
    """Also one that stores its weight the other way round, as GPT-2's square `attn.c_proj`."""
    model = wrap(build("gpt2"), target_modules=["attn.c_proj"])
    add(model, {"other": {"target_modules": ["c_attn"]}})
    names = ("other", BASE) if sizes else ("other", "other", BASE)
    with model.routing.using(Route(rows=names, sizes=sizes, shape=tuple(ids.shape))):
        mixed = output(model, ids)
    with model.routing.using(Route(shared=("other",))):
        torch.testing.assert_close(output(model, ids[:2]), mixed[:2], rtol=0, atol=1e-10)
