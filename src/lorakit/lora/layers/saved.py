"""A module that is trained whole, with a copy for each adapter that asked for it.

`modules_to_save` names such modules: a classification head, a resized embedding.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.layers.wrapped import WrappedModule
from lorakit.lora.routing import BASE, Routing


class ModulesToSaveWrapper(WrappedModule):
    """The frozen original and one trained copy an adapter, chosen by the route in force.

    Args:
        original_module: the base's own module, perhaps with wrappers of other adapters around it.
    """

    inner_name = "original_module"
    nesting = 0
    by_name = ("modules_to_save",)

    def __init__(self, original_module: nn.Module, routing: Routing) -> None:
        super().__init__(original_module, routing)
        self.get_base_layer().requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()

    def add_adapter(self, name: str, tied_to: nn.Module | None = None) -> None:
        """Starts adapter `name`'s own copy from the original, with the weight of `tied_to`."""
        own = copy.deepcopy(self.get_base_layer()).requires_grad_(True)
        if tied_to is not None:
            own.weight = tied_to.weight
        self.modules_to_save[name] = own

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of adapter `name`'s copy, buffers too, under their names in the original."""
        if name not in self.modules_to_save:
            return {}
        return self.modules_to_save[name].state_dict(keep_vars=True)

    @property
    def active_module(self) -> nn.Module:
        """The copy of the adapter on the route; the original when none of them has one.

        Raises:
            InputError: two copies cannot be added up, or rows have different ones.
        """
        route = self.routing.route
        if route.rows is None:
            return self.chosen(route.shared)
        own = {name if name in self.modules_to_save else BASE for name in route.rows}
        if len(own) > 1:
            raise InputError(f"{listed(own)} each have their own module for rows of one batch")
        return self.chosen(own)

    def require_together(self, names: Sequence[str]) -> None:
        """Raises InputError when two of these adapters have their own copy."""
        self.chosen(names)

    def chosen(self, names: Iterable[str]) -> nn.Module:
        """The module for adapters that are added up.

        Raises:
            InputError: two of them have their own.
        """
        own = [name for name in names if name in self.modules_to_save]
        if len(own) > 1:
            raise InputError(
                f"{listed(own)} have modules_to_save of their own: run adapters one at a time"
            )
        return self.modules_to_save[own[0]] if own else self.original_module

    def original(self, active: Iterable[str] = ()) -> nn.Module:
        """What takes this wrapper's place when it is taken out: an active copy, if there is one."""
        return self.chosen(active)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the active module returns; rows with different ones go through each its own."""
        route = self.routing.route
        names = [name for name in route.row_names if name in self.modules_to_save]
        if not names or len(set(route.rows or ())) == 1:
            return self.active_module(*args, **kwargs)
        x, *others = args
        index = route.row_index(x, names)
        if (index == len(names)).any():  # all rows, as others' wrappers inside go by the route
            y = self.original_module(x, *others, **kwargs).clone()
        else:
            y = None
        for i, name in enumerate(names):
            rows = index == i
            output = self.modules_to_save[name](x[rows], *others, **kwargs)
            y = output.new_empty(x.shape[0], *output.shape[1:]) if y is None else y
            y[rows] = output
        return y

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "modules_to_save" not in vars(self).get("_modules", {}):
                raise
            return getattr(self.active_module, name)
