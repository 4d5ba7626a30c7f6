"""Adapters of many kinds on tiny models, and their ΔW as a plain matrix."""

from pathlib import Path

import torch

import lorakit
from lorakit.adapters.open import open_adapter
from lorakit.lora.layers import LoraLayer
from lorakit.lora.wrapping import wrapped_modules

KINDS: dict[str, dict[str, object]] = {
    "plain": {"target_modules": "all-linear", "r": 4, "lora_alpha": 8},
    "rslora": {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 12,
        "rank_pattern": {"q_proj": 3, "layers.1.mlp.down_proj": 9},
        "alpha_pattern": {"down_proj": 5},
    },
    "one layer": {"target_modules": ["k_proj", "up_proj"], "r": 4, "layers_to_transform": [1]},
    "expression": {"target_modules": r".*layers\.0\..*(q|k)_proj", "r": 2},
    "pissa": {"target_modules": ["q_proj", "o_proj"], "r": 3, "init_lora_weights": "pissa"},
}


def save_adapter(base: Path | str, folder: Path, **config: object) -> Path:
    """A random adapter on the model in `base`, saved in `folder`."""
    model, _ = lorakit.load_model(str(base), "float32")
    torch.manual_seed(11)
    adapted = lorakit.get_peft_model(model, lorakit.LoraConfig(**config))  # type: ignore[arg-type]
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name and parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return folder


def updates(folder: Path, base: Path | str | None = None) -> dict[str, torch.Tensor]:
    """ΔW of every adapted module, as lorakit computes it."""
    opened = open_adapter(folder, base=base and str(base), dtype="float32")
    return {
        path: layer.get_delta_weight("default").detach()
        for path, layer in wrapped_modules(opened.model.get_base_model())
        if isinstance(layer, LoraLayer)
    }
