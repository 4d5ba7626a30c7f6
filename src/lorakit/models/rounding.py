"""A loaded model whose weights are rounded for inference on a CPU (`--weights int8`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.layers import unwrapped
from lorakit.models.fingerprint import ROUNDED, fingerprint
from lorakit.models.quantization.int8_linear import MULTIPLIED, Int8Linear, Int8Weight

WEIGHTS = ("int8",)
"""The forms in which weights can be stored for inference."""


@torch.no_grad()
def round_weights(model: nn.Module) -> int:
    """Rounds the weights of all plain linear layers of `model`, in place; returns their number.

    A layer whose weight is another module's too (a tied output layer) gets integers of its own.

    Args:
        model: without adapters.

    Raises:
        InputError: its weights are quantised already, not on a CPU, or there is none to round.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError("--weights int8: the base's weights are quantised already: leave it out")
    if next(model.parameters()).device.type != "cpu":
        raise InputError("--weights int8 is for a CPU: give --quantization int8 on a GPU")
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    vars(model)[ROUNDED] = fingerprint(model)
    count = 0
    for module in model.modules():
        layer: Any = unwrapped(module)
        if type(layer) is nn.Linear and layer.weight.dtype in MULTIPLIED:
            whole: Any = layer.weight
            rounded = Int8Weight.of(whole)
            if users[id(whole)] > 1:
                rounded.shared = whole
            layer.weight = rounded
            layer.__class__ = Int8Linear
            count += 1
    if not count:
        raise InputError(
            "--weights int8: the model has no linear layers in bfloat16 or float32 to round"
        )
    return count


def stored_as(model: Any, weights: str | None) -> Any:
    """`model` with its weights as `--weights` says, `int8` or None for as they are.

    Raises:
        InputError: there is no such form, or as in `round_weights`.
    """
    if weights not in (None, *WEIGHTS):
        raise InputError(f"--weights must be {', '.join(WEIGHTS)}, not {weights!r}")
    if weights is not None:
        round_weights(model)
    return model
