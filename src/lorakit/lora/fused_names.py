"""Targets under the usual names for models that have several usual layers in one.

GLM and Phi-3 compute a gate and an up-projection with one matrix, `gate_up_proj`. Whoever lists
both means all of its rows.
"""

from __future__ import annotations

import warnings

from torch import nn

FUSED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
}
"""The name of the one layer, and those of its parts in most models."""


def fused_targets(model: nn.Module, targets: list[str]) -> list[str]:
    """`targets` with the layer's own name in the place of all its parts, where it has them in one.

    A part alone is left as it is: it matches nothing, and whoever resolves it says so.
    """
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for whole, parts in FUSED.items():
        if whole not in leaves or leaves.intersection(parts) or not set(parts) <= set(targets):
            continue
        others = [target for target in targets if target not in parts]
        targets = others if whole in others else [*others, whole]
        warnings.warn(
            f"{', '.join(parts)} are one layer in this model, {whole}, which gets one pair of "
            "matrices",
            stacklevel=5,
        )
    return targets
