"""A module that is trained whole, with a copy for each adapter that asked for it.

`modules_to_save` names such modules: a classification head, a resized embedding.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.routing import Routing


class ModulesToSaveWrapper(nn.Module):
    """The frozen original and one trained copy an adapter, chosen by the route in force."""

    def __init__(self, original_module: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.original_module = original_module.requires_grad_(False)
        self.training = original_module.training
        self.modules_to_save = nn.ModuleDict()
        self.routing = routing

    def add_adapter(self, name: str) -> None:
        """Starts adapter `name`'s own copy from the original."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(True)

    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`'s copy, if it has one."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of adapter `name`'s copy, buffers too, under their names in the original."""
        if name not in self.modules_to_save:
            return {}
        return self.modules_to_save[name].state_dict(keep_vars=True)

    @property
    def active_module(self) -> nn.Module:
        """The copy of the adapter on the route; the original when none of them has one.

        Raises:
            InputError: two copies cannot be added up, nor chosen row by row.
        """
        route = self.routing.route
        if route.rows is None:
            return self.chosen(route.shared)
        return self.chosen(dict.fromkeys(route.rows), by_row=True)

    def chosen(self, names: Iterable[str], by_row: bool = False) -> nn.Module:
        """The module for adapters that are added up, or that serve rows of one batch."""
        names = list(names)
        own = [name for name in names if name in self.modules_to_save]
        if len(own) > 1 or (own and by_row and len(names) > 1):
            raise InputError(
                f"{listed(own)} have modules_to_save of their own: run adapters one at a time"
            )
        return self.modules_to_save[own[0]] if own else self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active module returns."""
        return self.active_module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.active_module, name)
