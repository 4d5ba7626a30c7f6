"""Layers that get the same input, and the packed factors beside them (`packed.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from lorakit.lora.columns import Columns, Plan
from lorakit.lora.routing import Route, Routing

FEW_TOKENS = 16
"""So many tokens of one adapter at most are multiplied by a copy of B in A's dtype."""

Base = Callable[[torch.Tensor], torch.Tensor]
"""A layer's own product of x (rows, …, d_in), with its bias: (rows, …, d_out)."""


class Packing(Protocol):
    """What all families have in common.

    Attributes:
        dtype: of the model's matrices.
        inner_dtype: of A.
        alone: whether all rows have one adapter, which is then multiplied with the weights.
        room: of so many columns at least, when some are made.
    """

    dtype: torch.dtype
    inner_dtype: torch.dtype
    alone: bool
    room: int

    def columns_of(self, name: str) -> tuple[int, int]:
        """Where the columns of adapter `name` begin and end."""

    def plan(self, route: Route, x: torch.Tensor) -> Plan:
        """The plan of a route for a layer's input x."""

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A matrix of the model's kind."""


class Family:
    """Layers that get the same input, and the factors of every packed adapter for them.

    One product then serves them all. An adapter's columns are those of the first layer, then those
    of the next; of B they are zero in the rows of the other layers.

    Args:
        base: what computes the only layer where its weight cannot lie here; None where the layers'
            weights, plain matrices of no other module's, lie here too.
    """

    def __init__(self, layers: Sequence[nn.Module], factors: Packing, base: Base | None) -> None:
        self.layers: Sequence[Any] = layers
        self.base = base
        self.names: list[set[str]] = [set() for _ in layers]
        """The adapters whose factors each layer has here."""
        self._packed, self.dtype = factors, factors.dtype
        shapes = [linear_shape(layer) or (0, 0) for layer in layers]
        self._d_in = shapes[0][1]
        self.sizes = [d_out for d_out, _ in shapes]
        ends = list(accumulate(self.sizes))
        self._rows = [slice(end - d, end) for end, d in zip(ends, self.sizes, strict=True)]
        self._A = factors.empty(0, self._d_in, dtype=factors.inner_dtype)
        """(columns, d_in)."""
        self._stack = factors.empty(ends[-1], 0 if base else self._d_in)
        """(all d_out, (d_in +) columns): the weights, if they are here, and every B."""
        self._before = self._stack.shape[1]
        self._bias: torch.Tensor | None = None
        if base is None:
            for layer, rows in zip(layers, self._rows, strict=True):
                self._stack[rows] = _weight(layer)
            self._take_biases()
        self._give_weights()
        self._plan: Plan | None = None  # that of the last product, and what follows of it
        self._mixed = False
        self._of_parts: list[tuple[Columns, torch.Tensor, torch.Tensor]] = []
        self._wide_B: list[torch.Tensor] = []
        """B of the parts (columns, all d_out) in A's dtype, once a few tokens have needed it."""
        self._others: list[list[tuple[int, int, str]] | None] = []
        self.has_others = False
        """Whether a row of the last output may have an adapter that is not packed (`others`)."""
        self._x: torch.Tensor | None = None
        self._route: Route | None = None
        self._outputs: Sequence[torch.Tensor] = ()
        self._left = 0  # layers that have not taken their outputs yet

    def put(
        self,
        name: str,
        begin: int,
        width: int,
        room: int,
        factors: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
    ) -> None:
        """Fills columns with an adapter's factors, of each layer, zeros where it has none.

        Args:
            room: how many columns a layer must have in all.
        """
        n = len(self.layers)
        if not len(self._A) and all(given is None for given in factors):
            return
        self.grow(room * n)
        A = self._A[begin * n : (begin + width) * n]
        B = self._stack[:, self._before + begin * n : self._before + (begin + width) * n]
        full = all(given is not None and given[0].shape[0] == width for given in factors)
        if not full:
            A.zero_()
        if not full or n > 1:
            B.zero_()
        for j, (rows, given) in enumerate(zip(self._rows, factors, strict=True)):
            self.names[j].discard(name)
            if given is not None:
                own = slice(j * width, j * width + given[0].shape[0])
                A[own], B[rows, own] = given[0].to(self.dtype), given[1]
                self.names[j].add(name)

    def drop(self, name: str, layer: int) -> None:
        """Takes the factors that an adapter has for one layer out again."""
        if name in self.names[layer]:
            begin, end = (len(self.layers) * at for at in self._packed.columns_of(name))
            self._stack[self._rows[layer], self._before + begin : self._before + end] = 0
            self.names[layer].discard(name)
            self._plan = self._x = None

    def factors(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (columns, d_in) of all layers, and B (d_out, columns) of this one, as they lie here."""
        return self._A, self._stack[self._rows[layer], self._before :]

    def output(self, x: torch.Tensor, layer: int, routing: Routing) -> torch.Tensor | None:
        """What the layer makes of x (rows, …, d_in), with the packed adapters: (rows, …, d_out).

        None where packed factors cannot compute it: with gradients, in another dtype, or where
        parts of rows or several adapters at once have the route.

        Raises:
            InputError: it cannot be told which row each of these belongs to.
        """
        route = routing.chosen
        if x is not self._x or route is not self._route or not routing.enabled:
            if (
                not routing.enabled
                or torch.is_grad_enabled()
                or len(route.shared) > 1
                or route.sizes is not None
                or x.dtype != self.dtype
            ):
                return None
            tokens = x.reshape(-1, self._d_in)
            y = self.computed(tokens, self._packed.plan(route, x), x).view(*x.shape[:-1], -1)
            self._x, self._route, self._left = x, route, len(self.layers)
            self._outputs = y.split(self.sizes, -1) if self._left > 1 else (y,)
        y = self._outputs[layer]
        self._left -= 1
        if not self._left:
            self._x, self._outputs = None, ()
        return y

    def others(
        self, x: torch.Tensor, layer: int, own: Mapping[str, Any]
    ) -> list[tuple[slice, str]]:
        """Which rows of x have an adapter that is among the layer's `own`, and not packed.

        It is asked behind `output`, of the same route.
        """
        plan, found = self._plan, self._others[layer]
        assert plan is not None
        if found is None:
            unpacked = own.keys() - self.names[layer]
            found = self._others[layer] = [g for g in plan.groups if g[2] in unpacked]
        if not found:
            return []
        return [(plan.tokens(first, last, x.shape[0]), name) for first, last, name in found]

    def computed(
        self, tokens: torch.Tensor, plan: Plan, x: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The outputs of all layers beside each other: (tokens, d_in) to (tokens, all d_out).

        Args:
            x: the tokens as the layers get them, where that is in another shape.
        """
        x = tokens if x is None else x
        mixes = plan.mixes(tokens)
        if plan is not self._plan or mixes is not self._mixed:
            self._plan, self._mixed = plan, mixes
            self._others = [None] * len(self.layers)
            named = {name for _, _, name in plan.groups}
            self.has_others = any(named - own for own in self.names)
            self._wide_B = []
            parts = (plan.whole if mixes else plan.parts) if len(self._A) else ()
            self._of_parts = [self._factors(part, mixes) for part in parts]
        if mixes and self._of_parts:
            ((_, A, B),) = self._of_parts
            inner = self._inner(tokens, A)
            inner.unflatten(1, (-1, len(self.layers))).masked_fill_(plan.hidden, 0)
            inner = inner.to(self.dtype)
            if self._before:
                return linear(torch.cat((tokens, inner), dim=1), B, self._bias)
            return self._base(x, tokens).addmm_(inner, B.T)
        if self._packed.alone and self._before and plan.rows == 1 and self._of_parts:
            # The only adapter's columns stand beside the weights: one product reads both.
            ((part, A, _),) = self._of_parts
            B = self._stack[:, : self._before + part.end * len(self.layers)]
            inner = self._inner(tokens, A).to(self.dtype)
            return linear(torch.cat((tokens, inner), dim=1), B, self._bias)
        y = self._base(x, tokens)
        if plan.rows == 1 and len(tokens) <= FEW_TOKENS and self._A.dtype != self.dtype:
            for at, (_, A, B) in enumerate(self._of_parts):
                if at == len(self._wide_B):
                    self._wide_B.append(B.T.to(self._A.dtype).contiguous())
                y.add_(self._inner(tokens, A) @ self._wide_B[at])
            return y
        for part, A, B in self._of_parts:
            if plan.rows == 1:
                y.addmm_(self._inner(tokens, A).to(self.dtype), B.T)
            else:
                own = plan.tokens(part.first, part.last, len(tokens))
                y[own].addmm_(self._inner(tokens[own], A).to(self.dtype), B.T)
        return y

    def _inner(self, tokens: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        """`x A`, in the dtype in which A lies here."""
        return tokens.to(A.dtype) @ A

    def _base(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if self.base is not None:
            return self.base(x).view(len(tokens), -1)
        return linear(tokens, self._weights, self._bias)

    def _factors(self, part: Columns, mixes: bool) -> tuple[Columns, torch.Tensor, torch.Tensor]:
        """A (d_in, columns), and B (all d_out, columns), behind the weights if it mixes."""
        n = len(self.layers)
        begin, end = part.begin * n, part.end * n
        of_B = slice(0 if mixes else self._before + begin, self._before + end)
        return part, self._A[begin:end].T, self._stack[:, of_B]

    def grow(self, columns: int) -> int:
        """Makes room for so many columns; at least twice what there was, so that it is rare.

        Returns: how many bytes it laid out anew, weights among them.
        """
        there = len(self._A)
        if columns <= there:
            return 0
        columns = max(columns, 2 * there, self._packed.room * len(self.layers))
        # Both before either is used, as there may be no memory for the second.
        A = self._packed.empty(columns, self._d_in, dtype=self._A.dtype)
        stack = self._packed.empty(len(self._stack), self._before + columns)
        A[:there] = self._A
        A[there:] = 0
        stack[:, : self._stack.shape[1]] = self._stack
        stack[:, self._stack.shape[1] :] = 0
        self._A, self._stack = A, stack
        self._plan = self._x = None
        self._give_weights()
        return A.nbytes + stack.nbytes

    def release(self) -> None:
        """Gives the layers weights and biases of their own again, one layer after the other."""
        for layer in self.layers:
            if self.base is None:
                for value in (layer.weight, getattr(layer, "bias", None)):
                    if value is not None:
                        value.data = value.data.clone(memory_format=torch.contiguous_format)
        self._stack = self._A = self._weights = self._packed.empty(0)

    def _take_biases(self) -> None:
        biases = [getattr(layer, "bias", None) for layer in self.layers]
        if all(bias is None for bias in biases):
            return
        self._bias = self._packed.empty(len(self._stack)).zero_()
        for bias, rows in zip(biases, self._rows, strict=True):
            if bias is not None:
                self._bias[rows] = bias
                bias.data = self._bias[rows]

    def _give_weights(self) -> None:
        """Lets the layers' own weights be the rows here, so that they are in memory once."""
        self._weights = self._stack[:, : self._before]
        if self._before:
            for layer, rows in zip(self.layers, self._rows, strict=True):
                weight = self._stack[rows, : self._d_in]
                layer.weight.data = weight if type(layer) is nn.Linear else weight.T


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
