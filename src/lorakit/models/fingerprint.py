"""A short fingerprint of a base model's weights, to notice an adapter on the wrong base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

_SAMPLED = 64  # values of each tensor: milliseconds for any model, and no two models agree


def fingerprint(model: nn.Module, without: Sequence[str] = ()) -> str:
    """SHA-256 over every parameter's name, shape, and first values rounded to bfloat16.

    The rounding makes it the same for a model loaded in bfloat16 and in float32. Take it before
    adapters are put on.

    Args:
        without: paths of modules that are not of the base: a new head.
    """
    return fingerprint_of(
        (name, parameter)
        for name, parameter in model.named_parameters()
        if not any(name.startswith(f"{path}.") for path in without)
    )


def fingerprint_of(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """As `fingerprint`, of parameters by name, wherever they come from."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda pair: pair[0]):
        values = parameter.detach().flatten()[:_SAMPLED].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
