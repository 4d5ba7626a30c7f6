"""Many adapters beside one frozen model, for inference: which there are, and which row has which.

How their factors lie beside each layer, and what a layer computes, is `slot_layers.py`'s. Training
many adapters goes by the same formula with gradients (`layers/base.py`), where each has its own
parameters. Here there are none, and adapters come and go while others are in use.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.slot_layers import Group, Part, Route, SlotLinear, linear_shape

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By module's path: A (r, d_in) and B (d_out, r) with the scaling in it; the update is B A."""


class AdapterSlots:
    """The adapters that are beside `model` now, and which row has which.

    The model is changed in place: layers are wrapped when the first adapter for them comes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        values = next(p for p in model.parameters() if p.is_floating_point())
        self.dtype, self.device = values.dtype, values.device
        self.layers: dict[str, SlotLinear] = {}
        self._groups: dict[tuple[str, int], Group] = {}
        self.route: Route | None = None
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
        width = max((A.shape[0] for A, _ in factors.values()), default=0)
        begin = self._free(width)
        for path in factors:
            if path not in self.layers:
                self._wrap(path)
        room = max(self.columns, begin + width)
        for path, layer in self.layers.items():
            layer.put(begin, width, room, factors.get(path))
        self._ranges[key] = begin, begin + width
        self._count()

    def remove(self, key: Hashable) -> None:
        """Frees an adapter's columns, which no row may have any more."""
        del self._ranges[key]
        self._count()

    def use(self, keys: Sequence[Hashable | None]) -> None:
        """Says which adapter each row of the next inputs has; None is the base alone."""
        if list(keys) != self._routes[0]:
            self._routes = list(keys), self._new_route(keys)
        self.route = self._routes[1]

    def _new_route(self, keys: Sequence[Hashable | None]) -> Route | None:
        parts, first = [], 0
        for key, group in groupby(keys):
            last = first + len(list(group))
            if key is not None:
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

    def _wrap(self, path: str) -> None:
        parent, _, name = path.rpartition(".")
        base = self.layer(path)
        _, d_in = linear_shape(base) or (0, 0)
        group = self._groups.setdefault((parent, d_in), Group(d_in, self))
        alone = sum(base.weight is p for p in _all_parameters(self.model)) == 1
        layer = SlotLinear(base, self, group, alone)
        self.layers[path] = layer  # first, as another thread may ask for what is beneath it
        setattr(self.model.get_submodule(parent), name, layer)


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every module's parameters, those that several modules share as often as they do."""
    return (p for module in model.modules() for p in module._parameters.values() if p is not None)
