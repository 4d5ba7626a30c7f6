"""A spectrum is that of the full matrix, and the effective rank counts equal directions."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lorakit
from lorakit.adapters.spectrum import Spectrum, spectra
from lorakit.lora.checkpoint import read_adapter, read_initial
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import LoraLayer
from lorakit.lora.locate import INITIAL_NAME
from lorakit.lora.wrapping import wrapped_modules


def spectrum_of(*values: float) -> Spectrum:
    return Spectrum("q_proj", len(values), (64, 64), 1.0, values)


def saved(model: nn.Module, folder: Path, **config: object) -> lorakit.LoraModel:
    """`model` with a random adapter, saved in `folder`."""
    torch.manual_seed(3)
    adapted = lorakit.get_peft_model(model, LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear", "r": 4},
        {"target_modules": "all-linear", "r": 4, "use_rslora": True, "lora_alpha": 6},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 9},
            "alpha_pattern": {"down_proj": 5},
        },
        {"target_modules": ["embed_tokens", "v_proj"], "r": 5},
        {"target_modules": "all-linear", "r": 6, "init_lora_weights": "pissa"},
        {"target_modules": ["q_proj"], "r": 40},  # more than the matrix has
    ],
)
def test_singular_values_are_those_of_the_whole_update_of_every_module(
    config: dict[str, object], tiny_model: Path, tmp_path: Path
):
    base, _ = lorakit.load_model(tiny_model, "float32")
    adapted = saved(base, tmp_path, **config)
    found, skipped = spectra(*read_adapter(tmp_path), read_initial(tmp_path))
    layers = {
        path: layer
        for path, layer in wrapped_modules(adapted.get_base_model())
        if isinstance(layer, LoraLayer)
    }
    assert not skipped
    assert {s.path for s in found} == set(layers)
    for s in found:
        layer = layers[s.path]
        delta = layer.get_delta_weight("default").double()
        full = torch.linalg.svdvals(delta)
        ours = torch.tensor(s.singular_values, dtype=torch.float64)
        torch.testing.assert_close(ours, full[: len(ours)], rtol=1e-4, atol=1e-6)
        assert full[len(ours) :].sum() < 1e-4
        assert s.norm == pytest.approx(delta.norm().item(), rel=1e-5)
        assert (s.r, s.scaling) == (layer.r["default"], layer.scaling["default"])
        assert s.shape == (layer.out_features, layer.in_features)


def test_the_effective_rank_of_k_equal_directions_is_k():
    for k in (1, 3, 16):
        s = spectrum_of(*[0.7] * k, *[0.0] * (16 - k))
        assert s.effective_rank == pytest.approx(k)
        assert s.directions(0.99) == k


def test_an_update_made_of_k_directions_has_rank_k_out_of_r():
    left, right = torch.linalg.qr(torch.randn(30, 3)).Q, torch.linalg.qr(torch.randn(20, 3)).Q
    # B A = left right^T, although both factors have 8 directions.
    mix = torch.linalg.qr(torch.randn(8, 8)).Q
    B = torch.cat([left, torch.zeros(30, 5)], dim=1) @ mix
    A = mix.T @ torch.cat([right.T, torch.randn(5, 20)])
    prefix = "base_model.model.layer.q_proj"
    tensors = {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    (s,), _ = spectra(LoraConfig(r=8, lora_alpha=16), tensors)
    assert s.effective_rank == pytest.approx(3, rel=1e-3)
    assert s.directions(0.999) == 3
    assert s.norm == pytest.approx(2 * 3**0.5, rel=1e-5)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=24))
def test_the_effective_rank_lies_between_1_and_the_number_of_directions(values: list[float]):
    s = spectrum_of(*sorted(values, reverse=True))
    assert 1 - 1e-9 <= s.effective_rank <= len(values) + 1e-9
    assert 1 <= s.directions(0.9) <= s.directions(0.99) <= len(values)
    squares = [v * v for v in s.singular_values]
    for share in (0.9, 0.99):
        n = s.directions(share)
        assert sum(squares[:n]) >= share * sum(squares) * (1 - 1e-9)
        assert sum(squares[: n - 1]) < share * sum(squares)


def test_an_adapter_that_has_not_moved_has_effective_rank_0(tiny_model: Path, tmp_path: Path):
    base, _ = lorakit.load_model(tiny_model)
    lorakit.get_peft_model(base, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    found, _ = spectra(*read_adapter(tmp_path))
    assert {(s.norm, s.effective_rank, s.directions(0.9)) for s in found} == {(0.0, 0.0, 0)}


def test_without_its_start_an_adapter_that_takes_it_off_has_no_spectrum(
    tiny_model: Path, tmp_path: Path
):
    base, _ = lorakit.load_model(tiny_model, "float32")
    saved(base, tmp_path, target_modules=["q_proj"], init_lora_weights="pissa")
    (tmp_path / INITIAL_NAME).unlink()
    found, skipped = spectra(*read_adapter(tmp_path), read_initial(tmp_path))
    assert not found
    assert "pissa factors that are not in the folder" in skipped[0].reason


def test_what_is_no_product_of_two_matrices_is_left_out_and_named(tmp_path: Path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 2)

    config = {"target_modules": ["conv", "linear"], "modules_to_save": ["head"], "r": 2}
    saved(Net(), tmp_path, **config)
    config_read, tensors = read_adapter(tmp_path)
    found, skipped = spectra(config_read, tensors)
    assert [s.path for s in found] == ["linear"]
    reasons = {s.path: s.reason for s in skipped}
    assert reasons.keys() == {"conv", "head.weight", "head.bias"}
    assert "convolution" in reasons["conv"]
    assert "trained whole" in reasons["head.weight"]

    config_read.r = 5
    _, skipped = spectra(config_read, tensors)
    reasons = {s.path: s.reason for s in skipped}
    assert reasons["linear"] == "has rank 2 in the file and 5 in the configuration"
    config_read.r = 2
    tensors["base_model.model.linear.lora_A.weight"][0, 0] = torch.nan
    found, skipped = spectra(config_read, tensors)
    assert not found
    assert "NaN or Inf" in {s.path: s.reason for s in skipped}["linear"]


def test_a_stack_of_experts_is_named_as_one():
    prefix = "base_model.model.layers.0.experts"
    tensors = {
        f"{prefix}.lora_A.weight": torch.ones(12, 8),
        f"{prefix}.lora_B.weight": torch.ones(5, 12),
    }
    _, (skipped,) = spectra(LoraConfig(r=3, target_parameters=["experts.down"]), tensors)
    assert skipped.path == "layers.0.experts"
    assert skipped.reason.startswith("a stack of 4 matrices")
