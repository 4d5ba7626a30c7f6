"""An adapter's values and optimizer state as they were at one moment, to be written to disk.

Copying takes the computing thread as long as memory takes; writing, which waits for the disk, is
done by whoever has the copy, while later steps change the adapter itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn

from lorakit import atomic
from lorakit.engine.adapter_optimizer import OPTIMIZER_NAME
from lorakit.lora.checkpoint import initial_factors, whole, write_adapter
from lorakit.lora.config import LoraConfig
from lorakit.lora.saving import write_card
from lorakit.openmp import released_afterwards

if TYPE_CHECKING:
    from lorakit.lora.model import LoraModel

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class AdapterCopy:
    """Everything that an adapter's folder holds; all tensors are copies on the CPU.

    Attributes:
        base: the wrapped model, whose name the card has.
        values: under the keys of PEFT's files.
        initial: initial factors that the values are to be taken against (PiSSA, OLoRA).
        optimizer: its state; empty where there is none.
    """

    base: nn.Module
    config: LoraConfig
    values: Tensors
    initial: Tensors
    optimizer: Tensors

    @classmethod
    def of(cls, model: LoraModel, name: str, optimizer: Tensors) -> AdapterCopy:
        """Copies the adapter `name` of a model, and the state of its optimizer."""
        base = model.get_base_model()
        values = {key: whole(tensor) for key, tensor in model.adapter_tensors(name).items()}
        initial = initial_factors(base, name)
        copied = (_copied(tensors) for tensors in (values, initial, optimizer))
        return cls(base, model.peft_config[name], *copied)

    @released_afterwards()
    def save(self, folder: str | Path) -> None:
        """Writes an adapter in PEFT's form, and its optimizer's state if there is one."""
        folder = Path(folder)
        write_adapter(folder, self.config, self.values, self.initial)
        write_card(folder, self.base)
        state = folder / OPTIMIZER_NAME
        if self.optimizer:
            with atomic.replacing_file(state) as temporary:
                save_file(dict(self.optimizer), temporary)
        else:
            state.unlink(missing_ok=True)


def _copied(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {
        key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
