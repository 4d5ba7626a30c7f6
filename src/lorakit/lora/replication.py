"""A deeper model out of the layers of another: `layer_replication`.

The copies share the original's weights, so that depth costs no memory; every copy has adapters of
its own (SOLAR-style upscaling, Kim et al. 2023, arXiv:2312.15166, without new weights).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from lorakit.errors import InputError

_NAMES = ("layers", "layer", "h", "blocks")


@dataclass
class Replication:
    """A replication that can be undone; none when `ranges` is None."""

    ranges: list[list[int]] | None = None
    model: Any = None
    parent: Any = None
    name: str = ""
    original: nn.ModuleList | None = None

    @classmethod
    def of(cls, model: nn.Module, ranges: list[Any] | None) -> Replication:
        """Builds the model's layers anew from `ranges`, each from, up to but without, to.

        Raises:
            InputError: the model has no list of layers, or a range is not within it.
        """
        if not ranges:
            return cls()
        parent, name, layers = _layers_of(model)
        for start, stop in ranges:
            if not 0 <= start < stop <= len(layers):
                raise InputError(
                    f"layer_replication: [{start}, {stop}) is not within the {len(layers)} layers"
                )
        numbers = [i for start, stop in ranges for i in range(start, stop)]
        setattr(parent, name, nn.ModuleList(_sharing_copy(layers[i]) for i in numbers))
        for position, layer in enumerate(getattr(parent, name)):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = position
        _count(model, len(numbers))
        return cls(ranges, model, parent, name, layers)

    def undo(self) -> None:
        """Gives the model its own layers back."""
        if self.original is not None:
            setattr(self.parent, self.name, self.original)
            _count(self.model, len(self.original))


def _layers_of(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.ModuleList) and name in _NAMES:
            return model.get_submodule(parent), name, module
    raise InputError("layer_replication: this model has no list of layers")


def _sharing_copy(layer: nn.Module) -> nn.Module:
    """A copy with modules of its own and the very parameters and buffers of `layer`."""
    shared = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in shared})


def _count(model: Any, layers: int) -> None:
    if hasattr(getattr(model, "config", None), "num_hidden_layers"):
        model.config.num_hidden_layers = layers
