"""Layers with many adapters beside them, for inference: where the factors lie, and the products.

Beside layers that get the same input, such as the projections of queries, keys and values, stand
two matrices, in which each adapter in use has a range of columns that is as wide as its rank. Rows
that have a token each, of different adapters, take two products for all of them together,
`x' = (x Aᵀ) · mask` and `[x x'] [W B]ᵀ`, in which the mask leaves every row its own columns. Rows
of one adapter, and prompts, take the columns of theirs alone, as a mask would multiply too much for
nothing. Exact for ranks of any kind: nothing is padded but layers in which an adapter has a smaller
rank, or none, with zeros. Why these forms: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from lorakit.weight_formats import is_quantized

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


class Family:
    """Layers that get the same input, and the factors of every adapter for them.

    One product then serves them all. Of `n` layers, column `c n + j` is the adapters' column `c` of
    layer `j`; of B it is zero in the rows of the other layers.

    Args:
        fused: whether the layers' weights, plain matrices of no other module's, lie here too;
            without that there is one layer.
    """

    def __init__(self, layers: Sequence[nn.Module], slots: AdapterSlots, fused: bool) -> None:
        self.layers: Sequence[Any] = layers
        self._slots = slots
        shapes = [linear_shape(layer) or (0, 0) for layer in layers]
        self._d_in = shapes[0][1]
        ends = list(accumulate(d_out for d_out, _ in shapes))
        self._rows = [slice(end - d_out, end) for end, (d_out, _) in zip(ends, shapes, strict=True)]
        self._A = slots.empty(0, self._d_in)
        """(columns, d_in)."""
        self._stack = slots.empty(ends[-1], self._d_in if fused else 0)
        """(all d_out, (d_in +) columns): the weights, if they are here, and every B."""
        self._before = self._stack.shape[1]
        self._bias: torch.Tensor | None = None
        if fused:
            for layer, rows in zip(layers, self._rows, strict=True):
                self._stack[rows] = _weight(layer)
            self._take_biases()
            self._give_weights()
        self._parts: Sequence[Part] = ()
        self._of_parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._x: torch.Tensor | None = None
        self._route: Route | None = None
        self._y = self._stack
        self._left = 0  # layers that have not taken their outputs yet

    def put(
        self,
        begin: int,
        width: int,
        room: int,
        factors: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
    ) -> None:
        """Fills columns with an adapter's factors, one pair a layer, zeros where it has none.

        Args:
            room: how many columns a layer must have in all.
        """
        n = len(self.layers)
        self._grow(room * n)
        A = self._A[begin * n : (begin + width) * n].zero_()
        B = self._stack[:, self._before + begin * n :][:, : width * n].zero_()
        for j, (rows, given) in enumerate(zip(self._rows, factors, strict=True)):
            if given is not None:
                A[j::n][: given[0].shape[0]] = given[0]
                B[rows, j::n][:, : given[1].shape[1]] = given[1]

    def output(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        """What the layer makes of x (rows, …, d_in), with the adapters: (rows, …, d_out)."""
        route = self._slots.route
        if x is not self._x or route is not self._route:
            self._x, self._route, self._left = x, route, len(self.layers)
            self._y = self._computed(x, route).view(*x.shape[:-1], -1)
        y = self._y[..., self._rows[layer]]
        self._left -= 1
        if not self._left:
            self._x, self._y = None, self._stack
        return y

    def _computed(self, x: torch.Tensor, route: Route | None) -> torch.Tensor:
        """(tokens, all d_out)."""
        tokens = x.reshape(-1, self._d_in)
        if route is None:
            return self._base(x, tokens)
        mixes = route.mixes(x)
        parts = route.whole if mixes else route.parts
        if parts is not self._parts:
            self._parts = parts
            self._of_parts = [self._factors(part, mixes) for part in parts]
        inner = [
            tokens[route.tokens(part, len(tokens))] @ A
            for part, (A, _) in zip(parts, self._of_parts, strict=True)
        ]
        if mixes:
            assert route.hidden is not None
            inner[0].unflatten(1, (-1, len(self.layers))).masked_fill_(route.hidden, 0)
            if self._before:
                weights_and_Bs = self._of_parts[0][1]
                return linear(torch.cat((tokens, inner[0]), dim=1), weights_and_Bs, self._bias)
        y = self._base(x, tokens)
        for part, product, (_, B) in zip(parts, inner, self._of_parts, strict=True):
            y[route.tokens(part, len(y))].addmm_(product, B.T)
        return y

    def _base(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if not self._before:
            y: torch.Tensor = self.layers[0](x)
            return y.view(len(tokens), -1)
        return linear(tokens, self._stack[:, : self._d_in], self._bias)

    def _factors(self, part: Part, mixes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """A (d_in, columns), and B (all d_out, columns), behind the weights if it mixes."""
        n = len(self.layers)
        begin, end = part.begin * n, part.end * n
        of_B = slice(0 if mixes else self._before + begin, self._before + end)
        return self._A[begin:end].T, self._stack[:, of_B]

    def _grow(self, columns: int) -> None:
        """Makes room for so many columns; at least twice what there was, so that it is rare."""
        there = len(self._A)
        if columns <= there:
            return
        columns = max(columns, 2 * there)
        # Both before either is used, as there may be no memory for the second.
        A = self._slots.empty(columns, self._d_in)
        stack = self._slots.empty(len(self._stack), self._before + columns)
        A[:there] = self._A
        A[there:] = 0
        stack[:, : self._stack.shape[1]] = self._stack
        stack[:, self._stack.shape[1] :] = 0
        self._A, self._stack = A, stack
        self._give_weights()

    def _take_biases(self) -> None:
        biases = [getattr(layer, "bias", None) for layer in self.layers]
        if all(bias is None for bias in biases):
            return
        self._bias = self._slots.empty(len(self._stack)).zero_()
        for bias, rows in zip(biases, self._rows, strict=True):
            if bias is not None:
                self._bias[rows] = bias
                bias.data = self._bias[rows]

    def _give_weights(self) -> None:
        """Lets the layers' own weights be the rows here, so that they are in memory once."""
        if self._before:
            for layer, rows in zip(self.layers, self._rows, strict=True):
                weight = self._stack[rows, : self._d_in]
                layer.weight.data = weight if type(layer) is nn.Linear else weight.T


class SlotModule(nn.Module):
    """A frozen module of the model's own, and what the slots add to its output.

    Attributes that are not found here are the base layer's.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer: Any = base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class SlotLinear(SlotModule):
    """A frozen linear layer (or GPT-2's `Conv1D`), and the adapters that its rows have."""

    def __init__(self, family: Family, number: int) -> None:
        super().__init__(family.layers[number])
        self._family, self._number = family, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, …, d_in) to (rows, …, d_out)."""
        return self._family.output(x, self._number)


def can_be_fused(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a layer is its weight and bias, of this dtype, and nothing else."""
    return (
        (type(layer) is nn.Linear or type(layer).__name__ == "Conv1D")
        and not is_quantized(layer)
        and all(p.dtype == dtype for p in layer.parameters())
        and not layer._forward_hooks
    )


def _weight(layer: Any) -> torch.Tensor:
    """(d_out, d_in)."""
    weight: torch.Tensor = layer.weight
    return weight if type(layer) is nn.Linear else weight.T


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer; None of another."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        d_in, d_out = getattr(layer, "weight").shape  # noqa: B009 (no attribute of every module)
        return d_out, d_in
    return None
