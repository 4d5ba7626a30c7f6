"""Modules with adapters beside their own parameters, such as stacked experts, for inference.

What such a module does with a parameter is its own affair, so its products cannot be shared: where
rows have different adapters, the module runs once for each of these, with `W + B A` in the place of
the parameter, and each row takes its own output. `LoraParameter` computes the same in training.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.func import functional_call

from lorakit.errors import InputError
from lorakit.lora.slot_layers import SlotModule

if TYPE_CHECKING:
    from lorakit.lora.slots import AdapterSlots

Stacks = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""By a parameter's name in its module: A (matrices, r, d_in), B (matrices, d_out, r)."""


class SlotParameters(SlotModule):
    """A frozen module, and what the slots' adapters add to its parameters for their rows."""

    def __init__(self, base_layer: nn.Module, slots: AdapterSlots) -> None:
        super().__init__(base_layer)
        self._slots = slots
        self._stacks: dict[Hashable, Stacks] = {}

    def put(self, key: Hashable, stacks: Stacks) -> None:
        """Takes in what an adapter adds."""
        self._stacks[key] = {
            name: (A.to(self._slots.device), B.to(self._slots.device))
            for name, (A, B) in stacks.items()
        }

    def remove(self, key: Hashable) -> None:
        """Forgets an adapter."""
        self._stacks.pop(key, None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output; of several rows the one with each row's adapter.

        Raises:
            InputError: rows have different adapters, and it cannot be told which part of the
                input is whose.
        """
        keys = [key if key in self._stacks else None for key in self._slots.rows]
        different = list(dict.fromkeys(keys))
        if len(different) < 2:
            return self._with(different[0] if different else None, args, kwargs)
        x = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        if len(x) % len(keys):
            raise InputError(
                f"{len(keys)} rows have different adapters, and {type(self.base_layer).__name__} "
                f"gets an input of {len(x)}, of which it cannot be told whose it is"
            )
        index = torch.tensor([different.index(key) for key in keys], device=x.device)
        index = index.repeat_interleave(len(x) // len(keys))
        outputs = torch.stack([self._with(key, args, kwargs) for key in different])
        return outputs[index, torch.arange(len(index), device=x.device)]

    def _with(self, key: Hashable | None, args: Any, kwargs: dict[str, Any]) -> Any:
        if key is None:
            return self.base_layer(*args, **kwargs)
        changed = {
            name: self._changed(getattr(self.base_layer, name), A, B)
            for name, (A, B) in self._stacks[key].items()
        }
        return functional_call(self.base_layer, changed, args, kwargs)

    def _changed(self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        if W.dim() == 2:
            return W + B[0] @ A[0]
        if is_transposed(self.base_layer):
            return torch.baddbmm(W, A.mT, B.mT)
        return torch.baddbmm(W, B, A)


def is_transposed(module: nn.Module) -> bool:
    """Whether a module's stacked parameters are (experts, d_in, d_out), as gpt-oss has them."""
    return bool(getattr(module, "is_transposed", False))


def stacked_shape(module: nn.Module, parameter: str) -> tuple[int, int, int] | None:
    """(matrices, d_out, d_in) of a module's parameter; None where it has none of 2 or 3 dimensions.

    A matrix alone is a stack of one.
    """
    W = dict(module.named_parameters(recurse=False)).get(parameter)
    if W is None or W.dim() not in (2, 3):
        return None
    count = W.shape[0] if W.dim() == 3 else 1
    d_out, d_in = (W.mT if W.dim() == 3 and is_transposed(module) else W).shape[-2:]
    return count, d_out, d_in
