"""What an adapter changes in the base itself, and how the base is had without it again.

That is the base's biases (`bias="all"`, `"lora_only"`), its layers (`layer_replication`), and its
weights where an initialisation quantises them. An adapter that does so stands beside no other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig

_LAYERS = ("layers", "layer", "h", "blocks")


def require_beside(name: str, config: LoraConfig, others: Mapping[str, LoraConfig]) -> None:
    """Raises InputError when the adapter `name` cannot stand beside `others`, by their names."""
    if name in others:
        raise InputError(f"there is an adapter '{name}' already")
    if not others:
        return
    every = [config, *others.values()]
    if any(one.bias != "none" for one in every):
        raise InputError(
            "an adapter with bias='all' or 'lora_only' trains the base itself and cannot "
            "stand beside others: set bias='none' for all of them"
        )
    for init in (one.init for one in every):
        if init.kind.changes_base:
            raise InputError(
                f"an adapter with init_lora_weights='{init.value}' quantises the base itself and "
                "cannot stand beside others"
            )


class TrainedBiases:
    """Biases in two versions, as they were and as they are trained; one is in force."""

    def __init__(self, biases: Iterable[torch.Tensor] = ()) -> None:
        self.biases = list(biases)
        self._others = [bias.detach().clone() for bias in self.biases]
        self.in_force = True

    def __len__(self) -> int:
        return len(self.biases)

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each bias as it was, and as it is trained, which must be in force."""
        return zip(self._others, self.biases, strict=True)

    @contextmanager
    def using(self, trained: bool) -> Iterator[None]:
        """`use` for the duration of a block."""
        before = self.in_force
        self.use(trained)
        try:
            yield
        finally:
            self.use(before)

    def use(self, trained: bool) -> None:
        """Puts the trained values, or those from before, in force; the others are kept."""
        if trained == self.in_force:
            return
        self.in_force = trained
        for i, bias in enumerate(self.biases):
            # Through `data`: autograd must not take it for a change of what it has saved.
            self._others[i], bias.data = bias.detach(), self._others[i].to(bias)


@dataclass
class Replication:
    """A deeper model out of the layers of another, which can be undone; none without `ranges`.

    The copies share the original's weights, so that depth costs no memory; every copy has adapters
    of its own (SOLAR-style upscaling, Kim et al. 2023, arXiv:2312.15166, without new weights).
    """

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
        if isinstance(module, nn.ModuleList) and name in _LAYERS:
            return model.get_submodule(parent), name, module
    raise InputError("layer_replication: this model has no list of layers")


def _sharing_copy(layer: nn.Module) -> nn.Module:
    """A copy with modules of its own and the very parameters and buffers of `layer`."""
    shared = [*layer.parameters(), *layer.buffers()]
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in shared})


def _count(model: Any, layers: int) -> None:
    if hasattr(getattr(model, "config", None), "num_hidden_layers"):
        model.config.num_hidden_layers = layers
