"""Many adapters beside one frozen model, for inference: their factors side by side.

Beside every adapted layer stand two matrices, in which each adapter in use has a range of columns
that is as wide as its rank. A step whose rows have different adapters is then two products for all
of them together, `(x Aᵀ · mask) Bᵀ`, in which the mask leaves every row its own columns; a step of
one adapter takes that one's columns alone. Exact for ranks of any kind: nothing is padded but
layers in which an adapter has a smaller rank, or none, with zeros.

Training many adapters goes by the same formula with gradients (`layers/base.py`), where each has
its own parameters. Here there are none, and adapters come and go while others are in use.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By module's path: A (r, d_in) and B (d_out, r) with the scaling in it; the update is B A."""


@dataclass(frozen=True)
class _Shared:
    """Every row has the adapter in these columns."""

    begin: int
    end: int


@dataclass(frozen=True)
class _ByRow:
    """`hidden` (rows, 1, columns) says which columns a row does not have."""

    hidden: torch.Tensor


class AdapterSlots:
    """The adapters that are beside `model` now, and which row has which.

    The model is changed in place: layers are wrapped when the first adapter for them comes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        values = next(p for p in model.parameters() if p.is_floating_point())
        self.dtype, self.device = values.dtype, values.device
        self.layers: dict[str, SlotLinear] = {}
        self.route: _Shared | _ByRow | None = None
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
            raise InputError(f"the base model has no module {path}") from error

    def require_fitting(self, factors: Factors) -> None:
        """Raises InputError where a module is missing, is no linear layer, or has another shape."""
        for path, (A, B) in factors.items():
            layer = self.layer(path)
            if (shape := _shape(layer)) is None:
                raise InputError(
                    f"{path} is a {type(layer).__name__}, and adapters are served beside linear "
                    "layers alone: merge this adapter (lorakit merge) and serve the result"
                )
            if (B.shape[0], A.shape[1]) != shape:
                raise InputError(
                    f"{path} has the shape {shape} in the base model, and the adapter is for "
                    f"{(B.shape[0], A.shape[1])}: it is another model's"
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
        if len(kinds := set(keys)) == 1:
            (key,) = kinds
            self.route = None if key is None else _Shared(*self._ranges[key])
            return
        hidden = torch.ones(len(keys), 1, self.columns, dtype=torch.bool)
        for row, key in enumerate(keys):
            if key is not None:
                begin, end = self._ranges[key]
                hidden[row, :, begin:end] = False
        self.route = _ByRow(hidden.to(self.device))

    def _free(self, width: int) -> int:
        """Where the first gap of `width` columns begins."""
        begin = 0
        for start, end in sorted(self._ranges.values()):
            if start - begin >= width:
                break
            begin = max(begin, end)
        return begin

    def _count(self) -> None:
        self.columns = max((end for _, end in self._ranges.values()), default=0)

    def _wrap(self, path: str) -> None:
        parent, _, name = path.rpartition(".")
        layer = SlotLinear(self.layer(path), self)
        setattr(self.model.get_submodule(parent), name, layer)
        self.layers[path] = layer


class SlotLinear(nn.Module):
    """A frozen linear layer (or GPT-2's `Conv1D`), and the adapters that the slots give its rows.

    Attributes that are not found here are the base layer's.
    """

    def __init__(self, base_layer: nn.Module, slots: AdapterSlots) -> None:
        super().__init__()
        self.base_layer = base_layer
        shape = _shape(base_layer)
        assert shape is not None
        self._d_out, self._d_in = shape
        object.__setattr__(self, "_slots", slots)  # no submodule: it holds the whole model
        self._A = self._B = torch.empty(0)  # (columns, d_in) and (columns, d_out)

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
        A, B = (matrix[begin : begin + width].zero_() for matrix in (self._A, self._B))
        if factors is not None:
            rank = factors[0].shape[0]
            A[:rank] = factors[0]
            B[:rank] = factors[1].T

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (rows, …, d_in) to (rows, …, d_out)."""
        y = self.base_layer(x, *args, **kwargs)
        route = self._slots.route
        if route is None:
            return y
        tokens = x.reshape(-1, self._d_in)
        if isinstance(route, _Shared):
            columns = slice(route.begin, route.end)
            inner = tokens @ self._A[columns].T
        else:
            columns = slice(0, route.hidden.shape[2])
            inner = tokens @ self._A[columns].T
            inner.view(len(route.hidden), -1, inner.shape[1]).masked_fill_(route.hidden, 0)
        y.view(-1, self._d_out).addmm_(inner, self._B[columns])
        return y

    def _grow(self, columns: int) -> None:
        """Makes room for so many columns; at least twice what there was, so that it is rare."""
        there = len(self._A)
        if columns <= there:
            return
        room = max(columns, 2 * there)
        for name, width in (("_A", self._d_in), ("_B", self._d_out)):
            grown = torch.zeros(room, width, dtype=self._slots.dtype, device=self._slots.device)
            grown[:there] = getattr(self, name)[:there].view(there, width)
            setattr(self, name, grown)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer; None of another."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        d_in, d_out = getattr(layer, "weight").shape  # noqa: B009 (no attribute of every module)
        return d_out, d_in
    return None
