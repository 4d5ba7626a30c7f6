"""What of a base model the protocol's `train_attn`, `train_mlp` and `train_unembed` mean."""

from __future__ import annotations

from typing import Any

from lorakit.errors import InputError
from lorakit.lora.architecture import output_head
from lorakit.lora.config import LoraConfig
from lorakit.lora.layer_family import linear_shape
from lorakit.lora.targets import resolve_targets
from lorakit.server.training import messages as m

ALPHA = 32
"""LoRA's alpha, for all ranks: W + (alpha / r) B A ("LoRA Without Regret", Thinking Machines)."""


class LoraParts:
    """The modules of a base model by part."""

    def __init__(self, base: Any) -> None:
        paths = _paths(base)
        every = [path for of_part in paths.values() for path in of_part]
        self._targets = {part: _short(of_part, every) for part, of_part in paths.items()}
        self._widths = {part: _width(base, of_part) for part, of_part in paths.items()}

    def config(self, lora: m.Lora) -> LoraConfig:
        """The configuration of a new adapter.

        Raises:
            InputError: nothing is to be trained.
        """
        targets = [name for part in self._wanted(lora) for name in self._targets[part]]
        if not targets:
            raise InputError("nothing is trained: set train_attn, train_mlp or train_unembed")
        return LoraConfig(
            r=lora.rank, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"
        )

    def parameters(self, lora: m.Lora) -> int:
        """How many trained parameters a new adapter has: r (d_in + d_out) beside each layer."""
        return lora.rank * sum(self._widths[part] for part in self._wanted(lora))

    def _wanted(self, lora: m.Lora) -> list[str]:
        wanted = {"attn": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
        return [part for part, is_wanted in wanted.items() if is_wanted]


def _paths(base: Any) -> dict[str, list[str]]:
    """The linear layers of attention and of the rest of each layer, and the output layer."""
    every = resolve_targets(base, LoraConfig(target_modules="all-linear"))
    attention = resolve_targets(base, LoraConfig(target_modules="attention"))
    head = output_head(base)
    paths = [path for path, module in base.named_modules() if module is head]
    return {
        "attn": attention,
        "mlp": [path for path in every if path not in set(attention)],
        "unembed": paths[:1],
    }


def _width(base: Any, paths: list[str]) -> int:
    """d_in + d_out of linear layers, summed."""
    layers = (base.get_submodule(path) for path in paths)
    shapes = (linear_shape(getattr(layer, "base_layer", layer)) for layer in layers)
    return sum(sum(shape) for shape in shapes if shape is not None)


def _short(paths: list[str], every: list[str]) -> list[str]:
    """The names of these modules without their path, where no other module is called so."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    same = [path for path in every if path.rpartition(".")[2] in names]
    return names if sorted(same) == sorted(paths) else paths
