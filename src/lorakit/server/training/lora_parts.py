"""What of a base model the protocol's `train_attn`, `train_mlp` and `train_unembed` mean."""

from __future__ import annotations

from typing import Any

from lorakit.errors import InputError
from lorakit.lora.architecture import output_head
from lorakit.lora.config import LoraConfig
from lorakit.lora.targets import resolve_targets
from lorakit.server.training import messages as m

ALPHA = 32
"""LoRA's alpha, for all ranks: W + (alpha / r) B A ("LoRA Without Regret", Thinking Machines)."""


class LoraParts:
    """The modules of a base model by part."""

    def __init__(self, base: Any) -> None:
        self._targets = _targets(base)

    def config(self, lora: m.Lora) -> LoraConfig:
        """The configuration of a new adapter.

        Raises:
            InputError: nothing is to be trained.
        """
        wanted = {"attn": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
        targets = [name for part, names in self._targets.items() if wanted[part] for name in names]
        if not targets:
            raise InputError("nothing is trained: set train_attn, train_mlp or train_unembed")
        return LoraConfig(
            r=lora.rank, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"
        )


def _targets(base: Any) -> dict[str, list[str]]:
    """The linear layers of attention and of the rest of each layer, and the output layer."""
    every = resolve_targets(base, LoraConfig(target_modules="all-linear"))
    attention = resolve_targets(base, LoraConfig(target_modules="attention"))
    head = output_head(base)
    paths = [path for path, module in base.named_modules() if module is head]
    found = {
        "attn": attention,
        "mlp": [path for path in every if path not in set(attention)],
        "unembed": paths[:1],
    }
    paths = [path for names in found.values() for path in names]
    return {part: _short(names, paths) for part, names in found.items()}


def _short(paths: list[str], every: list[str]) -> list[str]:
    """The names of these modules without their path, where no other module is called so."""
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    same = [path for path in every if path.rpartition(".")[2] in names]
    return names if sorted(same) == sorted(paths) else paths
