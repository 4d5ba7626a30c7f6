"""An adapter that a run has left as it was: found out tensor by tensor, and made a warning.

A run can end without an error and without having learned anything: no gradient reaches a module,
or no step has a learning rate. What is compared are checksums of the trained tensors' bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lorakit.errors import listed
from lorakit.training.step_lines import StepLines
from lorakit.training.watch import Warned

UNCHANGED = "unchanged"
"""The warning's name where no tensor at all has changed."""


class Start:
    """The trained tensors of a model as they are now, by checksum.

    Args:
        model: its parameters that require a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sums = _sums(model)

    def unchanged(self, model: nn.Module) -> tuple[list[str], int]:
        """The modules of which no trained tensor has changed, and the number of all modules."""
        before, now = self._sums, _sums(model)
        changed: dict[str, bool] = {}
        for name, value in now.items():
            module = name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0]
            changed[module] = changed.get(module, False) or before.get(name) != value
        return [module for module, moved in changed.items() if not moved], len(changed)


def warn_of_unchanged(start: Start, model: nn.Module, step: int, lines: StepLines) -> Iterator[str]:
    """Appends a warning to `lines` if modules are as they were at `start`; yields it as a line.

    Args:
        step: the run's last.
    """
    modules, total = start.unchanged(model)
    if not modules:
        return
    if len(modules) == total:
        warned = Warned(
            step,
            UNCHANGED,
            f"the adapter is unchanged: after {step} steps each of its {total} modules has the "
            "very numbers that it began with, so nothing was learned",
            "Look whether lora.target_modules take part in the loss, and whether "
            "training.learning_rate and its schedule are above 0.",
        )
    else:
        warned = Warned(
            step,
            "partly unchanged",
            f"{len(modules)} of {total} modules are unchanged after {step} steps: "
            f"{listed(modules, 3)}",
            "No gradient has reached them: leave them out of lora.target_modules, or train longer "
            "where they are experts.",
        )
    if not any(line.get("warning") == warned.name for line in lines.read()):
        lines.append(warned.to_dict())
    yield warned.line


@torch.no_grad()
def _sums(model: nn.Module) -> dict[str, int]:
    return {
        name: zlib.crc32(_bytes(parameter))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
