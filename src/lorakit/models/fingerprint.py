"""A short fingerprint of a base model's weights, to notice an adapter on the wrong base."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_SAMPLED = 64  # values of each tensor: milliseconds for any model, and no two models agree


def fingerprint(model: nn.Module, without: Sequence[str] = ()) -> str:
    """SHA-256 over every parameter's name, shape, and first values rounded to bfloat16.

    The rounding makes it the same for a model loaded in bfloat16 and in float32. Take it before
    adapters are put on.

    Args:
        without: paths of modules that are not of the base: a new head.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if any(name.startswith(f"{path}.") for path in without):
            continue
        values = parameter.detach().flatten()[:_SAMPLED].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
