"""Many adapters beside one frozen model, for inference: which there are, and which row has which.

How their factors lie beside each layer, and what a layer computes, is `slot_layers.py`'s. Training
many adapters goes by the same formula with gradients (`layers/base.py`), where each has its own
parameters. Here there are none, and adapters come and go while others are in use.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import groupby

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.slot_layers import (
    Family,
    Part,
    Route,
    SlotLinear,
    SlotModule,
    can_be_fused,
    linear_shape,
)
from lorakit.lora.slot_parameters import SlotParameters, Stacks, stacked_shape

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By module's path: A (r, d_in) and B (d_out, r) with the scaling in it; the update is B A.

By the path of a parameter that is adapted itself (`…mlp.experts.down_proj`), a mixture's experts
for one: A (matrices, r, d_in) and B (matrices, d_out, r).
"""


class AdapterSlots:
    """The adapters that are beside `model` now, and which row has which.

    The model is changed in place: layers are wrapped when the first adapter for them comes.

    Args:
        families: the paths of layers that get the same input, as `same_inputs` finds them. They
            share products.
    """

    def __init__(self, model: nn.Module, families: Iterable[Sequence[str]] = ()) -> None:
        self.model = model
        values = next(p for p in model.parameters() if p.is_floating_point())
        self.dtype, self.device = values.dtype, values.device
        self.layers: dict[str, SlotModule] = {}
        self._families: dict[Family, Sequence[str]] = {}
        self._together = {path: family for family in families for path in family}
        self._users = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        """By a parameter's id, how many modules have it."""
        self.route: Route | None = None
        self.rows: Sequence[Hashable | None] = ()
        """Which adapter each row has."""
        self._routes: tuple[list[Hashable | None], Route | None] = [], None
        self.columns = 0
        """Columns in use, those of adapters that have gone and lie between others among them."""
        self._ranges: dict[Hashable, tuple[int, int]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self._ranges

    def layer(self, path: str) -> nn.Module:
        """The module at `path` as it is without adapters.

        Raises:
            InputError: there is none.
        """
        if path in self.layers:
            return self.layers[path].base_layer
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise InputError(
                f"the base model has no module {path}: this is an adapter for another base model"
            ) from error

    def require_fitting(self, factors: Factors) -> None:
        """Raises InputError where a module is missing, is no linear layer, or has another shape."""
        for path, (A, B) in factors.items():
            if A.dim() == 3:
                parent, _, name = path.rpartition(".")
                if stacked_shape(self.layer(parent), name) != (len(A), B.shape[1], A.shape[2]):
                    raise InputError(f"{path} has another shape in the base model")
                continue
            layer = self.layer(path)
            if (shape := linear_shape(layer)) is None:
                raise InputError(
                    f"{path} is a {type(layer).__name__}, and adapters are served beside linear "
                    "layers alone: merge this adapter (lorakit merge) and serve the result"
                )
            if (own := (B.shape[0], A.shape[1])) != shape:
                raise InputError(
                    f"{path} has the shape {shape} in the base model, and {own} here: this is an "
                    "adapter for another base model"
                )

    def put(self, key: Hashable, factors: Factors) -> None:
        """Puts an adapter beside the model; `factors` must fit."""
        stacks: dict[str, Stacks] = {}
        for path, pair in factors.items():
            if pair[0].dim() == 3:
                parent, _, name = path.rpartition(".")
                stacks.setdefault(parent, {})[name] = pair
        for path, own in stacks.items():
            self._parameters(path).put(key, own)
        factors = {path: pair for path, pair in factors.items() if pair[0].dim() == 2}
        width = max((A.shape[0] for A, _ in factors.values()), default=0)
        begin = self._free(width)
        for path in factors:
            if path not in self.layers:
                self._wrap(self._together.get(path, (path,)))
        room = max(self.columns, begin + width)
        for family, paths in self._families.items():
            family.put(begin, width, room, [factors.get(path) for path in paths])
        self._ranges[key] = begin, begin + width
        self._count()

    def remove(self, key: Hashable) -> None:
        """Frees an adapter's columns, which no row may have any more."""
        del self._ranges[key]
        for layer in self.layers.values():
            if isinstance(layer, SlotParameters):
                layer.remove(key)
        self._count()

    def use(self, keys: Sequence[Hashable | None]) -> None:
        """Says which adapter each row of the next inputs has; None is the base alone."""
        if list(keys) != self._routes[0]:
            self._routes = list(keys), self._new_route(keys)
        self.rows, self.route = self._routes

    def _new_route(self, keys: Sequence[Hashable | None]) -> Route | None:
        parts, first = [], 0
        for key, group in groupby(keys):
            last = first + len(list(group))
            if key is not None and self._ranges[key][0] < self._ranges[key][1]:
                parts.append(Part(first, last, *self._ranges[key]))
            first = last
        if not parts:
            return None
        hidden = None
        if len(set(keys)) > 1:
            hidden = torch.ones(len(keys), self.columns, 1, dtype=torch.bool)
            for part in parts:
                hidden[part.first : part.last, part.begin : part.end] = False
            hidden = hidden.to(self.device)
        whole = (Part(0, len(keys), 0, self.columns),)
        return Route(len(keys), tuple(parts), whole, hidden)

    def empty(self, *shape: int) -> torch.Tensor:
        """A matrix of the model's kind."""
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def _free(self, width: int) -> int:
        """Where the first gap of `width` columns begins."""
        begin = 0
        for start, end in sorted(self._ranges.values()):
            if start - begin >= width:
                break
            begin = max(begin, end)
        return begin

    def _count(self) -> None:
        self._routes = [], None
        self.columns = max((end for _, end in self._ranges.values()), default=0)

    def _wrap(self, paths: Sequence[str]) -> None:
        """Puts layers that get the same input into one family, but those that must stay as is."""
        own = [path for path in paths if not self._is_fusible(path)]
        together = [path for path in paths if path not in own]
        for family_paths in (together, *([path] for path in own)):
            if not family_paths:
                continue
            layers = [self.layer(path) for path in family_paths]
            family = Family(layers, self, fused=family_paths is together)
            self._families[family] = family_paths
            for number, path in enumerate(family_paths):
                self._replace(path, SlotLinear(family, number))

    def _parameters(self, path: str) -> SlotParameters:
        """The module at `path` with adapters beside its parameters."""
        layer = self.layers.get(path)
        if not isinstance(layer, SlotParameters):
            layer = SlotParameters(self.layer(path), self)
            self._replace(path, layer)
        return layer

    def _replace(self, path: str, layer: SlotModule) -> None:
        parent, _, name = path.rpartition(".")
        self.layers[path] = layer  # first: another thread may ask for what is beneath it
        setattr(self.model.get_submodule(parent), name, layer)

    def _is_fusible(self, path: str) -> bool:
        layer = self.layer(path)
        return self._users[id(layer.weight)] == 1 and can_be_fused(layer, self.dtype)


@torch.no_grad()
def same_inputs(model: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """The paths of linear layers that get one and the same tensor while `run` calls the model.

    Layers that are called several times are left out.
    """
    calls: list[tuple[str, torch.Tensor]] = []

    def note(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, given: calls.append((path, given[0]))

    handles = [
        module.register_forward_pre_hook(note(path))
        for path, module in model.named_modules()
        if linear_shape(module) is not None
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(path for path, _ in calls)
    found: dict[int, list[str]] = {}  # the tensors live as long as `calls`, so no id comes twice
    for path, x in calls:
        if times[path] == 1:
            found.setdefault(id(x), []).append(path)
    return [paths for paths in found.values() if len(paths) > 1]
