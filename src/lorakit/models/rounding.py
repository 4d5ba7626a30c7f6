"""A loaded model whose weights are rounded for inference on a CPU (`--weights int8`, `int4`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.architecture import output_head
from lorakit.lora.layers import unwrapped
from lorakit.models.fingerprint import ROUNDED, fingerprint
from lorakit.models.quantization.int4_weight import BLOCK, GROUP, Int4Weight
from lorakit.models.quantization.int8_weight import Int8Weight
from lorakit.models.quantization.rounded_linear import MULTIPLIED, RoundedLinear, RoundedWeight

WEIGHTS = (Int8Weight.form, Int4Weight.form)
"""The forms in which weights can be stored for inference."""

_ON_A_GPU = {"int8": "int8", "int4": "nf4"}


@torch.no_grad()
def round_weights(model: nn.Module, form: str) -> int:
    """Rounds the weights of all plain linear layers of `model`, in place; returns their number.

    A layer whose weight is another module's too (a tied output layer) gets integers of its own.
    With `int4` the output layer has 8 bits, and so has a layer whose sizes blocks or groups do not
    divide.

    Args:
        model: without adapters.
        form: one of `WEIGHTS`.

    Raises:
        InputError: its weights are quantised already, not on a CPU, or none can be rounded so.
    """
    option = f"--weights {form}"
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(f"{option}: the base's weights are quantised already: leave it out")
    if next(model.parameters()).device.type != "cpu":
        raise InputError(f"{option} is for a CPU: give --quantization {_ON_A_GPU[form]} on a GPU")
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    vars(model)[ROUNDED] = fingerprint(model)
    head: Any = output_head(model)
    head = None if head is None else unwrapped(head)
    found: Counter[str] = Counter()
    for module in model.modules():
        layer: Any = unwrapped(module)
        if type(layer) is nn.Linear and layer.weight.dtype in MULTIPLIED:
            whole: Any = layer.weight
            in_4_bits = form == Int4Weight.form and layer is not head and Int4Weight.fits(whole)
            rounded: RoundedWeight = (Int4Weight if in_4_bits else Int8Weight).of(whole)
            if users[id(whole)] > 1:
                rounded.shared = whole
            layer.weight = rounded
            layer.__class__ = RoundedLinear
            found[rounded.form] += 1
    if not found:
        raise InputError(
            f"{option}: the model has no linear layers in bfloat16 or float32 to round"
        )
    if not found[form]:
        raise InputError(
            f"{option}: the model has no linear layers beside its output layer whose outputs "
            f"{BLOCK} divides and whose inputs {GROUP}: give --weights int8"
        )
    return found.total()


def stored_as(model: Any, weights: str | None) -> Any:
    """`model` with its weights as `--weights` says, `int8`, `int4` or None for as they are.

    Raises:
        InputError: there is no such form, or as in `round_weights`.
    """
    if weights not in (None, *WEIGHTS):
        raise InputError(f"--weights must be {' or '.join(WEIGHTS)}, not {weights!r}")
    if weights is not None:
        round_weights(model, weights)
    return model
