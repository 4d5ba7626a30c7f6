"""What holds for whatever shapes, ranks, dtypes and sets of adapters."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lorakit import LoraConfig, get_peft_model
from lorakit.lora.routing import BASE

DTYPES = st.sampled_from([torch.float64, torch.float32])
SIZES = st.integers(1, 9)
ADAPTERS = st.lists(
    st.fixed_dictionaries(
        {
            "r": st.integers(1, 6),
            "lora_alpha": st.integers(1, 32),
            "use_rslora": st.booleans(),
            "use_dora": st.booleans(),
            "target_modules": st.sampled_from([["0"], ["2"], ["0", "2"]]),
        }
    ),
    min_size=1,
    max_size=4,
)


def make(sizes: tuple[int, int, int], dtype: torch.dtype) -> nn.Module:
    d_in, hidden, d_out = sizes
    return nn.Sequential(nn.Linear(d_in, hidden), nn.Tanh(), nn.Linear(hidden, d_out)).to(dtype)


@given(st.tuples(SIZES, SIZES, SIZES), DTYPES, ADAPTERS, st.data())
def test_rows_of_a_batch_are_what_each_adapter_gives_alone(sizes, dtype, adapters, data):
    torch.manual_seed(0)
    model = make(sizes, dtype)
    plain = copy.deepcopy(model)
    names = [f"a{i}" for i in range(len(adapters))]
    for i, (name, fields) in enumerate(zip(names, adapters, strict=True)):
        config = LoraConfig(init_lora_weights=False, **fields)
        if i == 0:
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    rows = data.draw(st.lists(st.sampled_from([*names, BASE]), min_size=1, max_size=6))
    x = torch.randn(len(rows), sizes[0], dtype=dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0, "atol": 1e-9}
    mixed = model(x, adapter_names=rows)
    for name in {*rows}:
        model.set_adapter([] if name == BASE else name)
        chosen = [i for i, row in enumerate(rows) if row == name]
        torch.testing.assert_close(mixed[chosen], model(x)[chosen], **close)
    model.set_adapter(names[0])
    alone = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), alone, **close)
    bare = model.unload()
    for own, other in zip(bare.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other)


@given(ADAPTERS, st.lists(st.integers(-3, 3), min_size=4, max_size=4))
def test_a_linear_combination_is_the_sum_of_the_updates(adapters, weights):
    torch.manual_seed(0)
    x = torch.randn(5, 7, dtype=torch.float64)
    model = make((7, 6, 5), torch.float64)
    names = [f"a{i}" for i in range(len(adapters))]
    for i, (name, fields) in enumerate(zip(names, adapters, strict=True)):
        config = LoraConfig(init_lora_weights=False, **{**fields, "use_dora": False})
        if i == 0:
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    own = weights[: len(names)]
    model.add_weighted_adapter(names, own, "sum", combination_type="linear")
    for layer in (model.get_base_model()[0], model.get_base_model()[2]):
        if not hasattr(layer, "scaling"):
            continue
        total = sum(
            weight * layer.get_delta_weight(name)
            for name, weight in zip(names, own, strict=True)
            if name in layer.scaling
        )
        torch.testing.assert_close(layer.get_delta_weight("sum"), total, rtol=0, atol=1e-9)
    model.set_adapter("sum")
    assert torch.isfinite(model(x)).all()
