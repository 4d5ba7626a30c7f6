"""What all wrappers of a base's modules have in common, and their merge.

One module's merge is here, a whole model's in `lora/merging.py`. What a wrapper computes is in the
file of its kind: `layer.py` for low-rank adapters, `saved.py` and `tokens.py` for the others.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.layers.weight_updates import RowUpdate
from lorakit.lora.parameters import set_trainable
from lorakit.lora.routing import Route, Routing


class WrappedModule(nn.Module):
    """A frozen module of the base, and what each adapter has beside it.

    Attributes that the wrapper lacks are the module's own (`weight`, `in_features`).
    """

    base_layer: Any  # of many kinds, whose own attributes are used
    in_features: int
    out_features: int

    inner_name = "base_layer"
    """The attribute that holds the module inside, which may be a wrapper too."""

    nesting: int
    """The place among the wrappers of one module, from the outermost, 0.

    What rows have in place of the whole module (0), of a parameter (1), of rows of it (2), and what
    is added to it, by a tied embedding's factors (3) or by its own (4).
    """

    weight_name = "weight"
    """The name under which the base layer has the weight that is adapted."""

    by_name: tuple[str, ...] = ()
    """The attributes that are dictionaries by adapter name: together, all that an adapter has."""

    def __init__(self, module: nn.Module, routing: Routing | None = None) -> None:
        super().__init__()
        setattr(self, self.inner_name, module)
        self.routing = routing or Routing()
        self.training = module.training
        self.merged_adapters: list[str] = []
        self.shares: dict[str, float] = {}
        self._before_merge: nn.ParameterDict | None = None

    @property
    def inner(self) -> Any:
        """The module inside this wrapper."""
        return self._modules[self.inner_name]

    def get_base_layer(self) -> Any:
        """The base's own module, inside of all wrappers."""
        return unwrapped(self.inner)

    @property
    def base_weight(self) -> nn.Parameter:
        """The frozen weight, as the base layer stores it."""
        return getattr(self.get_base_layer(), self.weight_name)

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that have something here."""
        return list(getattr(self, self.by_name[0]))

    @property
    def active_adapters(self) -> list[str]:
        """The adapters of the route in force that have something here."""
        own = self.adapters
        return [name for name in self.routing.route.shared if name in own]

    @property
    def disable_adapters(self) -> bool:
        """Whether the base alone is computed, whatever is active."""
        return not self.routing.enabled

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters serve every row, in all layers that share this one's routing.

        Args:
            inference_mode: leave this layer's parameters of them frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.routing.route = Route(shared=tuple(names))
        for name in self.adapters:
            trainable = name in names and not inference_mode
            set_trainable(self.adapter_tensors(name).values(), trainable)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of adapter `name` under the ends of PEFT's keys (`lora_A.weight`, …)."""
        return {}

    def require_together(self, names: Sequence[str]) -> None:
        """Raises InputError when these adapters cannot serve the same row."""

    def set_share(self, name: str, share: float) -> None:
        """Multiplies all that adapter `name` changes by `share`; 1 is as it was trained."""
        self.shares[name] = share

    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`, if it has something here."""
        if name in self.merged_adapters:
            others = [other for other in self.merged_adapters if other != name]
            self.unmerge()
            self.merge(others)
        self.shares.pop(name, None)
        for attribute in self.by_name:
            if name in (values := getattr(self, attribute)):
                del values[name]

    def original(self, active: Iterable[str] = ()) -> nn.Module:
        """What takes this wrapper's place when it is taken out: the module inside."""
        return self.inner

    # --- merging --------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the base weight contains an adapter's update now."""
        return bool(self.merged_adapters)

    @torch.no_grad()
    def merge(
        self,
        adapter_names: Iterable[str] | None = None,
        *,
        safe_merge: bool = False,
        keep_backup: bool = True,
    ) -> None:
        """Adds the update of `adapter_names` (None: the active ones) to the base's parameters.

        The sum is made in the wider of the two dtypes and rounded once, also when adapters are
        merged one after the other. It becomes a new parameter, so a weight that is tied to this
        one elsewhere stays as it is; the parameter that was there is kept for `unmerge`, unless
        `keep_backup` is false.

        Raises:
            InputError: with `safe_merge`, when the merged weight has NaN or Inf; or the adapter
                cannot be merged into this layer.
        """
        wanted = self.active_adapters if adapter_names is None else dict.fromkeys(adapter_names)
        own = self.adapters
        new = [n for n in wanted if n in own and n not in self.merged_adapters]
        if not new:
            return
        names = self.merged_adapters + new
        merged = {one: self.merged_parameter(one, names) for one in self.changed_parameters(names)}
        if safe_merge and not all(torch.isfinite(total).all() for total in merged.values()):
            raise InputError(
                "NaNs detected in the merged weights. The adapter "
                f"{', '.join(new)} seems to be broken: its weights, or the sums, are not finite"
            )
        before = {name: self._unmerged(name) for name in merged}
        for name, total in merged.items():
            setattr(self.get_base_layer(), name, self._as_parameter(total, before[name]))
        if keep_backup:
            self._before_merge = nn.ParameterDict(before)
        self.merged_adapters += new

    def unmerge(self) -> None:
        """Gives the base layer the very weight back that it had before merging."""
        if not self.merged:
            return
        if self._before_merge is None:
            raise RuntimeError("this layer was merged without a backup and cannot be unmerged")
        for name, parameter in self._before_merge.items():
            setattr(self.get_base_layer(), name, parameter)
        self._before_merge = None
        self.merged_adapters = []

    def changed_parameters(self, names: Sequence[str]) -> list[str]:
        """The base's parameters that merging `names` changes.

        Raises:
            InputError: these adapters cannot be merged into this layer.
        """
        raise NotImplementedError(f"{type(self).__name__} has nothing to merge")

    def merged_parameter(self, parameter: str, names: Sequence[str]) -> torch.Tensor:
        """One of the base's parameters with `names` added to it, not yet rounded."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to merge")

    def row_updates(self, parameter: str, names: Sequence[str]) -> list[RowUpdate] | None:
        """What `names` add to that parameter, row by row; None where rows depend on each other.

        Where there are some, `merged_parameter` is made of them, so that a weight merged in parts
        has the same bytes as one that was merged whole.
        """
        return None

    def update_energy(self, names: Sequence[str]) -> float | None:
        """‖ΔW‖² of what `names` together add to the weight; None where it has to be measured."""
        return None

    def _as_parameter(self, total: torch.Tensor, before: nn.Parameter) -> nn.Parameter:
        """A merged tensor as the base layer's parameter, as the one before is stored."""
        return nn.Parameter(total.to(before.dtype), requires_grad=False)

    def _unmerged(self, name: str) -> nn.Parameter:
        """The base layer's parameter as it is without anything merged."""
        if self._before_merge is not None and name in self._before_merge:
            return self._before_merge[name]
        return getattr(self.get_base_layer(), name)

    def __getattr__(self, name: str) -> Any:
        if (module := self.__dict__.get("_modules", {}).get(name)) is not None:
            return module  # what is asked for most, in the shortest way
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = vars(self).get("_modules", {}).get(self.inner_name)
            if inner is None:
                raise
            return getattr(inner, name)


def unwrapped(module: nn.Module) -> Any:
    """The base's own module, where `module` is one of the wrappers around it; else `module`."""
    while isinstance(module, WrappedModule):
        module = module.inner
    return module
