"""A module that is trained whole, with a copy for each adapter that asked for it.

`modules_to_save` names such modules: a classification head, a resized embedding.
"""

import copy
from typing import Any

from torch import nn

from lorakit.lora.routing import Routing


class ModulesToSaveWrapper(nn.Module):
    """The frozen original and one trained copy an adapter, chosen by the route in force."""

    def __init__(self, original_module: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.original_module = original_module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()
        self.routing = routing

    def add_adapter(self, name: str) -> None:
        """Starts adapter `name`'s own copy from the original."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(True)

    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`'s copy, if it has one."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]

    def adapter_tensors(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of adapter `name`'s copy, under their names in the original."""
        if name not in self.modules_to_save:
            return {}
        return dict(self.modules_to_save[name].named_parameters())

    @property
    def active_module(self) -> nn.Module:
        """The copy of the adapter on the route; the original when none of them has one.

        Raises:
            RuntimeError: two copies cannot be added up, nor chosen row by row.
        """
        route = self.routing.route
        names = route.shared if route.rows is None else route.row_names
        present = [name for name in names if name in self.modules_to_save]
        if not present:
            return self.original_module
        if len(present) > 1 or (route.rows is not None and len(set(route.rows)) > 1):
            raise RuntimeError(
                f"the adapters {', '.join(names)} have modules_to_save of their own: "
                "run them one at a time"
            )
        return self.modules_to_save[present[0]]

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
