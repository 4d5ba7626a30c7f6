"""Layers with many adapters beside them, for inference: where the factors lie, and the products.

Beside every adapted layer stand two matrices, in which each adapter in use has a range of columns
that is as wide as its rank. Rows that have a token each, of different adapters, take two products
for all of them together, `x' = (x Aᵀ) · mask` and `[x x'] [W B]ᵀ`, in which the mask leaves every
row its own columns. Rows of one adapter, and prompts, take the columns of theirs alone, as a mask
would multiply too much for nothing. Exact for ranks of any kind: nothing is padded but layers in
which an adapter has a smaller rank, or none, with zeros. Layers that get the same input, such as
the projections of queries, keys and values, share the product with A. Why these forms:
docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from lorakit.lora.slots import AdapterSlots


class Part(NamedTuple):
    """Rows beside each other that have the same adapter, and its columns."""

    first: int
    last: int
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Route:
    """Which rows have which columns.

    Attributes:
        rows: how many there are.
        parts: those that have an adapter.
        whole: the only part in which every row has all columns.
        hidden: (rows, columns, 1), which of these a row does not have; None where all rows have
            the same adapter.
    """

    rows: int
    parts: tuple[Part, ...]
    whole: tuple[Part, ...]
    hidden: torch.Tensor | None

    def mixes(self, x: torch.Tensor) -> bool:
        """Whether one product serves all rows of x: those that have a single token each."""
        return self.hidden is not None and x.numel() == self.rows * x.shape[-1]

    def tokens(self, part: Part, count: int) -> slice:
        """Which of `count` tokens are of the part's rows."""
        if part.last - part.first == self.rows:
            return slice(None)
        each = count // self.rows
        return slice(part.first * each, part.last * each)


class Group:
    """Layers of one parent that may get the same input, and their factors A.

    Row `c n + j` of the matrix is column `c` of the layer `j` of `n`.
    """

    def __init__(self, d_in: int, slots: AdapterSlots) -> None:
        self._slots, self._d_in = slots, d_in
        self._A = torch.empty(0, 0, d_in)  # (columns, layers, d_in)
        self._parts: Sequence[Part] = ()
        self._A_of_parts: list[torch.Tensor] = []  # each (d_in, columns * layers)
        self._x: torch.Tensor | None = None
        self._products: list[torch.Tensor] = []
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

    def inner(self, x: torch.Tensor, layer: int, route: Route) -> list[torch.Tensor]:
        """`x Aᵀ` of a layer for each part of the route, masked if it mixes: (tokens, columns)."""
        mixes = route.mixes(x)
        parts = route.whole if mixes else route.parts
        if parts is not self._parts:
            self._parts, self._x = parts, None
            self._A_of_parts = [self._A[p.begin : p.end].flatten(0, 1).T for p in parts]
        if x is not self._x:
            self._x, self._left = x, self.size
            tokens = x.reshape(-1, self._d_in)
            self._products = [
                (tokens[route.tokens(part, len(tokens))] @ A).unflatten(1, (-1, self.size))
                for part, A in zip(parts, self._A_of_parts, strict=True)
            ]
            if mixes and route.hidden is not None:
                self._products[0].masked_fill_(route.hidden, 0)
        self._left -= 1
        if not self._left:
            self._x = None
        return [product.select(2, layer) for product in self._products]


class SlotLinear(nn.Module):
    """A frozen linear layer (or GPT-2's `Conv1D`), and the adapters that the slots give its rows.

    Attributes that are not found here are the base layer's.

    Args:
        alone: whether no other module has its weight. That is then kept with the factors B in one
            matrix, so that both take one product.
    """

    def __init__(
        self, base_layer: nn.Module, slots: AdapterSlots, group: Group, alone: bool
    ) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        shape = linear_shape(base_layer)
        assert shape is not None
        self._d_out, self._d_in = shape
        object.__setattr__(self, "_slots", slots)  # no submodule: it holds the whole model
        self._group, self._number = group, group.join()
        weight = self._own_weight() if alone else None
        self._before = 0 if weight is None else self._d_in
        self._stack = slots.empty(self._d_out, 0) if weight is None else weight
        """d_out, (d_in +) columns: the weight, if it is here, and every B."""
        self._parts: Sequence[Part] = ()
        self._of_parts: list[torch.Tensor] = []

    def _own_weight(self) -> torch.Tensor | None:
        """The weight as (d_out, d_in), where it is a plain matrix of the model's dtype."""
        weight: torch.Tensor = self.base_layer.weight
        if weight.dtype != self._slots.dtype:
            return None
        if type(self.base_layer) is nn.Linear:
            return weight.data
        return weight.data.T if type(self.base_layer).__name__ == "Conv1D" else None

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
        self._group.put(self._number, begin, self._stack.shape[1] - self._before, width, A)
        columns = self._stack[:, self._before + begin :][:, :width]
        columns.zero_()
        if B is not None:
            columns[:, : B.shape[1]] = B

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, …, d_in) to (rows, …, d_out)."""
        route = self._slots.route
        if route is None:
            return self.base_layer(x)
        inner = self._group.inner(x, self._number, route)
        with_weight = route.mixes(x) and self._before > 0
        parts = route.whole if route.mixes(x) else route.parts
        if parts is not self._parts:
            self._parts, before = parts, self._before
            self._of_parts = [
                self._stack[:, 0 if with_weight else before + part.begin : before + part.end]
                for part in parts
            ]
        if with_weight:
            both = torch.cat((x.reshape(-1, self._d_in), *inner), dim=1)
            (weight_and_Bs,) = self._of_parts
            y = nn.functional.linear(both, weight_and_Bs, self.base_layer.bias)
            return y.view(*x.shape[:-1], self._d_out)
        y = self.base_layer(x)
        tokens = y.view(-1, self._d_out)
        for part, product, B in zip(parts, inner, self._of_parts, strict=True):
            tokens[route.tokens(part, len(tokens))].addmm_(product, B.T)
        return y

    def _grow(self, columns: int) -> None:
        """Makes room for so many columns; at least twice what there was, so that it is rare."""
        there = self._stack.shape[1] - self._before
        if columns <= there:
            return
        grown = self._slots.empty(self._d_out, self._before + max(columns, 2 * there))
        grown[:, : self._stack.shape[1]] = self._stack
        grown[:, self._stack.shape[1] :] = 0
        self._stack = grown
        if self._before:
            weight = grown[:, : self._d_in]
            plain = type(self.base_layer) is nn.Linear
            self.base_layer.weight.data = weight if plain else weight.T

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer; None of another."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        d_in, d_out = getattr(layer, "weight").shape  # noqa: B009 (no attribute of every module)
        return d_out, d_in
    return None
