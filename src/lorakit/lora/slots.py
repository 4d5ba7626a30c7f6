"""Many adapters beside one frozen model, for inference: their factors side by side.

Beside every adapted layer stand two matrices, in which each adapter in use has a range of columns
that is as wide as its rank. A step whose rows have different adapters is then two products for all
of them together, `x' = (x Aᵀ) · mask` and `[x x'] [W B]ᵀ`, in which the mask leaves every row its
own columns; a step of one adapter takes that one's columns alone. Exact for ranks of any kind:
nothing is padded but layers in which an adapter has a smaller rank, or none, with zeros. Layers
that get the same input, such as the projections of queries, keys and values, share the product
with A. Why this form: docs/performance.md.

Training many adapters goes by the same formula with gradients (`layers/base.py`), where each has
its own parameters. Here there are none, and adapters come and go while others are in use.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By module's path: A (r, d_in) and B (d_out, r) with the scaling in it; the update is B A."""


@dataclass(frozen=True, eq=False)
class _Shared:
    """Every row has the adapter in these columns."""

    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class _ByRow:
    """`hidden` (rows, 1, columns, 1) says which columns a row does not have."""

    hidden: torch.Tensor
    end: int
    begin = 0


_Route = _Shared | _ByRow


class AdapterSlots:
    """The adapters that are beside `model` now, and which row has which.

    The model is changed in place: layers are wrapped when the first adapter for them comes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        values = next(p for p in model.parameters() if p.is_floating_point())
        self.dtype, self.device = values.dtype, values.device
        self.layers: dict[str, SlotLinear] = {}
        self._groups: dict[tuple[str, int], _Group] = {}
        self.route: _Route | None = None
        self._routes: tuple[list[Hashable | None], _Route | None] = [], None
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
            if (shape := _shape(layer)) is None:
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

    def _new_route(self, keys: Sequence[Hashable | None]) -> _Route | None:
        if len(kinds := set(keys)) == 1:
            (key,) = kinds
            return None if key is None else _Shared(*self._ranges[key])
        hidden = torch.ones(len(keys), 1, self.columns, 1, dtype=torch.bool)
        for row, key in enumerate(keys):
            if key is not None:
                begin, end = self._ranges[key]
                hidden[row, :, begin:end] = False
        return _ByRow(hidden.to(self.device), self.columns)

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
        d_in = _require_shape(base)[1]
        group = self._groups.setdefault((parent, d_in), _Group(d_in, self))
        alone = sum(base.weight is p for p in _all_parameters(self.model)) == 1
        layer = SlotLinear(base, self, group, alone)
        setattr(self.model.get_submodule(parent), name, layer)
        self.layers[path] = layer


class _Group:
    """Layers of one parent that may get the same input, and their factors A.

    Row `c n + j` of the matrix is column `c` of the layer `j` of `n`.
    """

    def __init__(self, d_in: int, slots: AdapterSlots) -> None:
        self._slots, self._d_in = slots, d_in
        self._A = torch.empty(0, 0, d_in)  # (columns, layers, d_in)
        self._route: _Route | None = None
        self._A_on_route = self._A  # (d_in, columns * layers)
        self._x: torch.Tensor | None = None
        self._product = self._A
        self._left = 0  # layers that have not taken the product yet
        self.size = 0

    def join(self) -> int:
        """Makes room for one more layer; returns its number."""
        self.size += 1
        return self.size - 1

    def put(self, layer: int, begin: int, room: int, width: int, A: torch.Tensor | None) -> None:
        if self._A.shape[0] < room or self._A.shape[1] < self.size:
            grown = torch.zeros(
                max(room, self._A.shape[0]),
                self.size,
                self._d_in,
                dtype=self._slots.dtype,
                device=self._slots.device,
            )
            there = self._A.shape
            grown[: there[0], : there[1]] = self._A
            self._A = grown
        self._A[begin : begin + width, layer] = 0
        if A is not None:
            self._A[begin : begin + len(A), layer] = A

    def inner(self, x: torch.Tensor, layer: int, route: _Route) -> torch.Tensor:
        """`x Aᵀ` of a layer for the columns of the route, masked: (tokens, columns)."""
        if route is not self._route:
            self._route, self._x = route, None
            self._A_on_route = self._A[route.begin : route.end].flatten(0, 1).T
        if x is not self._x:
            self._x, self._left = x, self.size
            self._product = self._multiplied(x, route)
        self._left -= 1
        if not self._left:
            self._x = None
        return self._product.select(2, layer)

    def _multiplied(self, x: torch.Tensor, route: _Route) -> torch.Tensor:
        """(tokens, columns, layers)."""
        product = x.reshape(-1, self._d_in) @ self._A_on_route
        product = product.view(len(product), -1, self.size)
        if isinstance(route, _ByRow):
            rows = len(route.hidden)
            by_row = product if len(product) == rows else product.unflatten(0, (rows, -1))
            hidden = route.hidden[:, 0] if by_row is product else route.hidden
            by_row.masked_fill_(hidden, 0)
        return product


class SlotLinear(nn.Module):
    """A frozen linear layer (or GPT-2's `Conv1D`), and the adapters that the slots give its rows.

    Attributes that are not found here are the base layer's.

    Args:
        alone: whether no other module has its weight. That is then kept with the factors B in one
            matrix, transposed, so that both take one product.
    """

    def __init__(
        self, base_layer: nn.Module, slots: AdapterSlots, group: _Group, alone: bool
    ) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self._d_out, self._d_in = _require_shape(base_layer)
        object.__setattr__(self, "_slots", slots)  # no submodule: it holds the whole model
        self._group, self._number = group, group.join()
        self._weight = self._own_weight() if alone else None
        self._below = self._d_in if self._weight is not None else 0
        self._stack = self._weight if self._weight is not None else slots.empty(0, self._d_out)
        """(d_in +) columns, d_out: the weight's transpose, if it is here, and every B's."""
        self._route: _Route | None = None
        self._on_route = self._stack

    def _own_weight(self) -> torch.Tensor | None:
        """The weight as (d_in, d_out), where it is a plain matrix of the model's dtype."""
        weight: torch.Tensor = self.base_layer.weight
        if type(self.base_layer) is nn.Linear and weight.dtype == self._slots.dtype:
            return weight.data.T.contiguous()
        if type(self.base_layer).__name__ == "Conv1D" and weight.dtype == self._slots.dtype:
            return weight.data
        return None

    def put(
        self,
        begin: int,
        width: int,
        room: int,
        factors: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Fills columns with an adapter's factors, or with zeros where it has none here.

        Args:
            room: how many columns there must be in all.
        """
        self._grow(room)
        A, B = factors or (None, None)
        self._group.put(self._number, begin, len(self._stack) - self._below, width, A)
        place = self._below + begin
        self._stack[place : place + width] = 0
        if B is not None:
            self._stack[place : place + B.shape[1]] = B.T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, …, d_in) to (rows, …, d_out)."""
        route = self._slots.route
        if route is None:
            return self.base_layer(x)
        inner = self._group.inner(x, self._number, route)
        with_weight = self._below and isinstance(route, _ByRow)
        if route is not self._route:
            begin = 0 if with_weight else self._below + route.begin
            self._route, self._on_route = route, self._stack[begin : self._below + route.end]
        if not with_weight:
            y = self.base_layer(x)
            y.view(-1, self._d_out).addmm_(inner, self._on_route)
            return y
        both = torch.cat((x.reshape(-1, self._d_in), inner), dim=1)
        bias = self.base_layer.bias
        y = both @ self._on_route if bias is None else torch.addmm(bias, both, self._on_route)
        return y.view(*x.shape[:-1], self._d_out)

    def _grow(self, columns: int) -> None:
        """Makes room for so many columns; at least twice what there was, so that it is rare."""
        there = len(self._stack) - self._below
        if columns <= there:
            return
        grown = self._slots.empty(self._below + max(columns, 2 * there), self._d_out)
        grown[: len(self._stack)] = self._stack
        grown[len(self._stack) :] = 0
        self._stack = grown
        if self._below:
            weight = grown[: self._d_in]
            plain = type(self.base_layer) is nn.Linear
            self.base_layer.weight.data = weight.T if plain else weight

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def _all_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every module's parameters, those that several modules share as often as they do."""
    return (p for module in model.modules() for p in module._parameters.values() if p is not None)


def _require_shape(layer: nn.Module) -> tuple[int, int]:
    shape = _shape(layer)
    assert shape is not None
    return shape


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer; None of another."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        d_in, d_out = getattr(layer, "weight").shape  # noqa: B009 (no attribute of every module)
        return d_out, d_in
    return None
