"""A layer for a new kind of module is one registration: train, files and merge follow it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit.cli.main import app
from lorakit.lora import layers
from lorakit.lora.layers import LoraLinear, register_layer
from small_runs import recipe

GAIN = 0.5


class Scaled(nn.Module):
    """`y = gain * x W` with W (d_in, d_out): no linear layer that PyTorch knows."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return GAIN * x @ self.weight


class ScaledConfig(LlamaConfig):
    model_type = "scaled_llama"


class ScaledLlama(LlamaForCausalLM):
    config_class = ScaledConfig

    def __init__(self, config: ScaledConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            o = layer.self_attn.o_proj
            layer.self_attn.o_proj = Scaled(o.in_features, o.out_features)


class LoraScaled(LoraLinear):
    """LoRA beside it: the update of `W` passes through the gain too."""

    def __init__(self, base_layer: nn.Module, *args: Any, **options: Any) -> None:
        super().__init__(base_layer, *args, **options | {"fan_in_fan_out": True})

    def _low_rank(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return GAIN * super()._low_rank(x, name)


@pytest.fixture
def scaled_model(tiny_model: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder of such a model, which transformers and lorakit both know while the test runs."""
    AutoConfig.register("scaled_llama", ScaledConfig, exist_ok=True)
    AutoModelForCausalLM.register(ScaledConfig, ScaledLlama, exist_ok=True)
    before = list(layers._KINDS)
    register_layer(LoraScaled, Scaled)
    values = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    folder = tmp_path / "scaled"
    shutil.copytree(tiny_model, folder)
    torch.manual_seed(0)
    ScaledLlama(ScaledConfig(**values | {"model_type": "scaled_llama"})).save_pretrained(folder)
    yield folder
    layers._KINDS[:] = before


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 6, 7, 8]])).logits


def test_a_layer_of_a_new_kind_trains_is_read_again_and_merges(scaled_model, rows, tmp_path):
    values = recipe(scaled_model, rows, tmp_path / "out")
    values["lora"]["target_modules"] = "attention"
    (tmp_path / "recipe.json").write_text(json.dumps(values), encoding="utf-8")
    app(["train", str(tmp_path / "recipe.json")], standalone_mode=False)
    base = AutoModelForCausalLM.from_pretrained(scaled_model, dtype=torch.float32)
    bare = logits(base)
    model = lorakit.PeftModel.from_pretrained(base, tmp_path / "out")
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    assert isinstance(layer, LoraScaled)
    assert layer.matrices("default")[1].any()  # trained
    adapted = logits(model)
    assert not torch.allclose(adapted, bare, atol=1e-3)
    app(["merge", str(tmp_path / "out"), "-o", str(tmp_path / "merged")], standalone_mode=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert isinstance(merged.model.layers[0].self_attn.o_proj, Scaled)
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)
