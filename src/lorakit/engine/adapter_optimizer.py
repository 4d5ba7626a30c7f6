"""One adapter's optimizer: its step, and its state as a file beside the adapter's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from lorakit.errors import InputError

OPTIMIZER_NAME = "optimizer.safetensors"


@dataclass(frozen=True)
class AdamW:
    """One step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Args:
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The optimizer's state of these parameters, by `parameter:name`, as the file has it."""
    return {
        f"{key}:{name}": torch.as_tensor(value).detach()
        for key, parameter in parameters.items()
        for name, value in optimizer.state[parameter].items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.Tensor], path: Path
) -> None:
    for whole, value in load_file(path).items():
        key, _, name = whole.rpartition(":")
        if key not in parameters:
            raise InputError(f"{path} is of another adapter: it has {key}")
        parameter = parameters[key]
        own = value.to(parameter.device if name == "step" else parameter)
        optimizer.state[parameter][name] = own
