"""Combining adapters is defined on what they do: on their updates ΔW."""

import copy
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families import output, to_peft, wrap
from lorakit import LoraConfig, LoraModel
from lorakit.errors import InputError
from lorakit.lora.combination import METHODS, CombineSettings, Update, combine
from lorakit.lora.layers import LoraLayer
from lorakit.lora.wrapping import wrapped_modules

TARGETS = {
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "gpt2": ["c_attn", "wte"],
    "conv": ["one", "two", "head"],
}


def two_adapters(base: torch.nn.Module, targets: list[str], **second: Any) -> LoraModel:
    model = wrap(base, target_modules=targets, r=3, lora_alpha=5)
    fields = {"r": 3, "target_modules": targets[:2], "init_lora_weights": False, **second}
    torch.manual_seed(9)
    model.add_adapter("other", LoraConfig(**fields))
    return model


def updates(model: LoraModel, name: str) -> dict[str, torch.Tensor]:
    layers = wrapped_modules(model.get_base_model())
    return {
        path: layer._weight_update(name)
        for path, layer in layers
        if isinstance(layer, LoraLayer) and name in layer.r
    }


@pytest.mark.parametrize("method", ["linear", "cat"])
@pytest.mark.parametrize("family", TARGETS)
def test_the_exact_methods_give_the_weighted_sum_of_the_updates(build, family: str, method: str):
    model = two_adapters(build(family), TARGETS[family], r=2, use_rslora=True, lora_alpha=7)
    lost = model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum", method)
    assert lost == 0
    ours, a, b = (updates(model, name) for name in ("sum", "default", "other"))
    assert ours.keys() == a.keys() | b.keys()
    for path, update in ours.items():
        expected = 0.7 * a[path] - 1.3 * b.get(path, torch.zeros(()))
        torch.testing.assert_close(update, expected, rtol=0, atol=1e-12)


def test_where_only_one_adapter_has_biases_of_b_every_other_layer_gets_zeros(build, ids, tmp_path):
    base = build()
    model = wrap(copy.deepcopy(base), target_modules=["q_proj", "down_proj"], lora_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            parameter.data.normal_()
    fields = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    model.add_adapter("other", LoraConfig(**fields))
    model.add_weighted_adapter(["default", "other"], [1, 1], "sum", "linear")
    tensors = model.adapter_tensors("sum")
    assert len([key for key in tensors if key.endswith("lora_B.bias")]) == len(tensors) // 3 == 6
    model.set_adapter(["default", "other"])
    expected = output(model, ids)
    model.set_adapter("sum")
    torch.testing.assert_close(output(model, ids), expected, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "sum")
    torch.testing.assert_close(output(loaded, ids), expected, rtol=0, atol=1e-6)


def test_biases_of_b_and_an_embedding_cannot_be_in_one_adapter(build):
    model = wrap(build(), target_modules=["q_proj"], lora_bias=True)
    model.add_adapter("other", LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(InputError, match=r"embed_tokens is an embedding.* default has one"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "sum", "linear")
    assert model.adapters == ["default", "other"]


def test_the_sum_serves_as_both_active_adapters_do_and_goes_through_files(build, ids, tmp_path):
    base = build()
    model = two_adapters(copy.deepcopy(base), TARGETS["llama"], r=2, lora_alpha=7)
    model.add_weighted_adapter(["default", "other"], [1, 1], "sum", "linear")
    model.set_adapter(["default", "other"])
    expected = output(model, ids)
    model.set_adapter("sum")
    torch.testing.assert_close(output(model, ids), expected, rtol=0, atol=1e-10)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "sum")
    torch.testing.assert_close(output(theirs, ids), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"use_rslora": True}),
        ("llama", {"use_dora": True}),
        ("llama", {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}),
        ("gpt2", {"use_dora": True, "use_rslora": True}),
        ("conv", {"use_rslora": True, "use_dora": True}),
        ("conv", {"lora_bias": True}),
        ("llama", {"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}}),
    ],
)
def test_one_adapter_with_weight_one_stays_itself(build, ids, family, fields, method):
    model = wrap(build(family), **{"target_modules": TARGETS[family], **fields})
    expected = output(model, ids)
    model.add_weighted_adapter(["default"], [1.0], "same", method, density=0.5)
    model.set_adapter("same")
    assert torch.equal(output(model, ids), expected)


@pytest.mark.parametrize("method", ["ties_svd", "magnitude_prune_svd", "dare_ties_svd"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_sparse_methods_of_full_rank_give_what_pefts_form_on_updates_gives(
    build, tmp_path, method: str, sign: str
):
    base = build()
    targets = ["q_proj", "down_proj"]
    model = two_adapters(copy.deepcopy(base), targets)
    theirs = to_peft(model, base, tmp_path)
    options = {"svd_rank": 16, "density": 0.5, "majority_sign_method": sign}
    # PEFT's weights are float32, and its TIES elects signs before they are multiplied in.
    names, weights = ["default", "other"], [0.75, 0.75 if "ties" in method else -0.5]
    if method.startswith("dare"):
        options["density"] = 1.0  # draws differ; with nothing dropped there are none
    theirs.add_weighted_adapter(names, weights, "sum", method, **options)
    model.add_weighted_adapter(names, weights, "sum", method, **options)
    for path, update in updates(model, "sum").items():
        layer = theirs.base_model.model.get_submodule(path)
        torch.testing.assert_close(update, layer.get_delta_weight("sum"), rtol=0, atol=1e-10)


def test_pefts_linear_has_cross_terms_and_keeps_a_name_of_its_own(build, tmp_path):
    base = build()
    model = two_adapters(copy.deepcopy(base), ["q_proj", "o_proj"], lora_alpha=7)
    theirs = to_peft(model, base, tmp_path)
    names, weights = ["default", "other"], [0.75, -0.5]
    theirs.add_weighted_adapter(names, weights, "sum", "linear")
    model.add_weighted_adapter(names, weights, "factors", "linear_factors")
    model.add_weighted_adapter(names, weights, "sum", "linear")
    exact = updates(model, "sum")
    for path, update in updates(model, "factors").items():
        delta = theirs.base_model.model.get_submodule(path).get_delta_weight("sum")
        torch.testing.assert_close(update, delta, rtol=0, atol=1e-7)
        assert (update - exact[path]).norm() > 0.5 * exact[path].norm()


def some_updates(seed: int, ranks: list[int], weights: list[float]) -> list[Update]:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return [Update(draw(r, 9), draw(7, r), 0.5, w) for r, w in zip(ranks, weights, strict=True)]


@given(
    seed=st.integers(0, 99),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    rank=st.integers(1, 12),
    data=st.data(),
)
def test_svd_is_the_best_approximation_and_says_what_it_lost(seed, ranks, rank, data):
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=len(ranks), max_size=len(ranks)))
    parts = some_updates(seed, ranks, weights)
    total = torch.stack([u.weight * u.delta() for u in parts]).sum(0)
    found = combine(parts, CombineSettings("svd", rank))
    S = torch.linalg.svdvals(total)
    lost = S[rank:].square().sum()
    torch.testing.assert_close(
        (total - found.B @ found.A).square().sum(), lost, rtol=1e-6, atol=1e-9
    )
    assert abs(found.lost - lost.item()) < 1e-6 * (1 + found.energy)
    assert found.A.shape[0] <= rank


def test_dare_keeps_the_mean_and_draws_what_the_generator_says():
    (part,) = some_updates(0, [3], [1.0])
    draws = [
        combine(
            [part],
            CombineSettings("dare_linear", 9, 0.5, generator=torch.Generator().manual_seed(i)),
        )
        for i in (*range(400), 0)
    ]
    deltas = torch.stack([d.B @ d.A for d in draws])
    assert torch.equal(deltas[0], deltas[-1])
    assert not torch.equal(deltas[0], deltas[1])
    assert (deltas.mean(0) - part.delta()).abs().max() < 0.25 * part.delta().abs().max()


def test_magnitude_prune_keeps_the_largest_entries():
    (part,) = some_updates(0, [3], [1.0])
    found = combine([part], CombineSettings("magnitude_prune_svd", 9, density=0.2))
    delta, kept = part.delta(), found.B @ found.A
    largest = delta.abs() >= delta.abs().flatten().topk(round(0.2 * delta.numel())).values.min()
    torch.testing.assert_close(kept, delta * largest, rtol=0, atol=1e-12)


def test_what_cannot_be_combined_is_said(build):
    model = two_adapters(build(), ["q_proj", "o_proj"], use_dora=True)
    both = ["default", "other"]

    def refusal(*args: Any, **options: Any) -> str:
        before = dict(model.named_parameters())
        with pytest.raises(InputError) as error:
            model.add_weighted_adapter(*args, **options)
        assert model.adapters == both
        assert dict(model.named_parameters()).keys() == before.keys()
        return str(error.value)

    assert "did you mean 'default'" in refusal(["defualt"], [1], "new")
    assert "'tie' is not a way to combine" in refusal(both, [1, 1], "new", "tie")
    assert "ties needs a density" in refusal(both, [1, 1], "new", "ties")
    assert "full rank: use svd" in refusal(both, [1, 1], "new", "linear")
    assert "a weight for each" in refusal(both, [1], "new")
    assert "different adapters" in refusal(["other", "other"], [1, 1], "new")
    assert "there is an adapter 'other' already" in refusal(["default"], [1], "other")
    assert "the rank must be at least 1" in refusal(both, [1, 1], "new", "svd", svd_rank=0)
    assert model.add_weighted_adapter(both, [1, 1], "new", "svd", svd_rank=16) < 1e-12
