"""The factors of a bank's adapters as inference multiplies them: a copy, laid out for its products.

Beside linear layers that get the same input, such as the projections of queries, keys and values,
stand two matrices, in which each adapter has a range of columns that is as wide as its rank. Rows
that have a token each, of different adapters, take two products for all of them together,
`x' = (x Aᵀ) · mask` and `[x x'] [W B]ᵀ`, in which the mask leaves every row its own columns. Rows
of one adapter, and prompts, take that adapter's columns alone. Exact for ranks of any kind: layers
in which an adapter has a smaller rank, or none, have zeros. Why these forms: docs/performance.md.
Whatever is not laid out here (DoRA, a bias, other kinds of layers) the layers compute themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from lorakit.lora.columns import Columns, Plan
from lorakit.lora.layer_family import Base, Family, linear_shape
from lorakit.lora.routing import BASE, Route
from lorakit.weight_formats import format_of


class PackedFactors:
    """The adapters of a bank whose factors are packed, and where.

    Args:
        model: the bank's model.
        families: the paths of layers that get the same input, as `same_inputs` finds them. They
            share products.
        alone: there is never more than one adapter. Its product is that of the weights then, which
            rounds otherwise than the form for any place among others.
        room: for so many columns there is room from the first adapter on; for more it is made as
            they come.
    """

    def __init__(
        self,
        model: nn.Module,
        families: Iterable[Sequence[str]] = (),
        alone: bool = False,
        room: int = 0,
    ) -> None:
        self.alone, self.room = alone, room
        values = next(p for p in model.parameters() if p.is_floating_point())
        self.dtype, self.device = values.dtype, values.device
        half = self.dtype in (torch.bfloat16, torch.float16) and self.device.type == "cpu"
        self.inner_dtype = torch.float32 if half else self.dtype
        """Of A. A small product takes ten times as long in bfloat16 on a processor (oneDNN)."""
        self._together = {path: tuple(family) for family in families for path in family}
        self._families: dict[tuple[str, ...], Family] = {}
        """By the paths of the layers that are in it."""
        self._model = model
        self._users = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        """By a parameter's id, how many modules have it."""
        self.layers: dict[str, Any] = {}
        """Every `LoraLinear` that was ever here, by its path; some are in the model no more."""
        self.joined: dict[str, Any] = {}
        """By adapter, all wrappers that have it, where they are known."""
        self._ranges: dict[str, tuple[int, int]] = {}
        self.version = 0
        """Changes whenever a family or an adapter comes, goes or has other factors."""
        self.columns = 0
        """Columns in use, those of adapters that have gone and lie between others among them."""
        self._planned: tuple[object, Plan | None] = None, None

    def __contains__(self, name: str) -> bool:
        return name in self._ranges

    def by_layer(self) -> dict[int, Family]:
        """The families by the ids of their layers, which are the base's own."""
        return {id(own): family for family in self._families.values() for own in family.layers}

    @torch.no_grad()
    def hold(self, families: Iterable[Sequence[str]]) -> None:
        """Lays the weights of layers that no adapter has yet side by side, those of each family.

        Args:
            families: paths of layers that get the same input. Those whose weights cannot lie here
                stay as they are.
        """
        there = {path for paths in self._families for path in paths}
        for paths in families:
            layers = [self._base_of(path) for path in paths]
            if there.isdisjoint(paths) and all(map(self._is_fusible, layers)):
                self._make(tuple(paths), None)
        self._count()

    @torch.no_grad()
    def make_room(self, paths: Collection[str], rank: int) -> Iterator[int]:
        """Makes the room that `put` needs for an adapter of layers at `paths`, family by family.

        What lies here is the same after each of them, and routes may be computed in between.

        Yields: how many bytes were laid out anew.
        """
        columns = max(self.columns, self._free(rank) + rank)
        there = {path: own for own in self._families for path in own}
        families = (there.get(path) or self._together.get(path, (path,)) for path in paths)
        for own in dict.fromkeys(families):
            if own not in self._families and {*own} <= {*paths}:
                self.hold([own])
            if own in self._families and (size := self._families[own].grow(columns * len(own))):
                self._count()
                yield size

    def columns_of(self, name: str) -> tuple[int, int]:
        """Where the columns of adapter `name` begin and end."""
        return self._ranges[name]

    @torch.no_grad()
    def put(self, name: str, layers: Mapping[str, Any]) -> None:
        """Packs the factors of adapter `name`, again if it is packed.

        Args:
            layers: the `LoraLinear` that it has, and whose products are made here, by their paths.
        """
        try:
            self._put(name, layers)
        except BaseException:
            self.remove(name)
            raise

    def _put(self, name: str, layers: Mapping[str, Any]) -> None:
        self.remove(name)
        factors = {path: layer.packed_factors(name, self.dtype) for path, layer in layers.items()}
        ranks = [given[0].shape[0] for given in factors.values() if given is not None]
        width = max(ranks, default=0)
        begin = self._free(width)
        self.layers |= layers
        self._gather(layers)
        room = max(self.columns, begin + width)
        for paths, family in self._families.items():
            family.put(name, begin, width, room, [factors.get(path) for path in paths])
        self._ranges[name] = begin, begin + width
        self._count()

    def remove(self, name: str) -> None:
        """Frees an adapter's columns."""
        self._ranges.pop(name, None)
        self.joined.pop(name, None)
        for family in self._families.values():
            for names in family.names:
                names.discard(name)
        self._count()

    @torch.no_grad()
    def release(self) -> None:
        """Takes all adapters out, and leaves the layers as they were before the first one."""
        for family in self._families.values():
            family.release()
        for layer in self.layers.values():
            layer.family, layer.place = None, 0
        self._families, self.layers, self.joined, self._ranges = {}, {}, {}, {}
        self._count()

    def plan(self, route: Route, x: torch.Tensor) -> Plan:
        """The plan of a route for a layer's input x (batch, …) or (batch * tokens, d_in).

        Raises:
            InputError: it cannot be told which row each of these belongs to.
        """
        key = route.rows, route.shared
        known, plan = self._planned
        if plan is None or known != key:  # else the rows are those of before
            plan = self._new_plan(route.rows or route.shared or (BASE,))
            self._planned = key, plan
        if plan.rows > 1:
            route.require_rows(x)
        return plan

    def _new_plan(self, names: Sequence[str]) -> Plan:
        if len(set(names)) == 1:
            names = names[:1]
        groups, first = [], 0
        for name, group in groupby(names):
            last = first + len(list(group))
            if name != BASE:
                groups.append((first, last, name))
            first = last
        parts = tuple(
            Columns(first, last, *self._ranges[name])
            for first, last, name in groups
            if name in self._ranges and self._ranges[name][0] < self._ranges[name][1]
        )
        hidden = None
        if parts and len(names) > 1:
            hidden = torch.ones(len(names), self.columns, 1, dtype=torch.bool)
            for part in parts:
                hidden[part.first : part.last, part.begin : part.end] = False
            hidden = hidden.to(self.device)
        whole = (Columns(0, len(names), 0, self.columns),)
        return Plan(len(names), tuple(groups), parts, whole, hidden)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A matrix of the model's kind."""
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def _free(self, width: int) -> int:
        """Where the first gap of `width` columns begins."""
        begin = 0
        for start, end in sorted(self._ranges.values()):
            if start - begin >= width:
                break
            begin = max(begin, end)
        return begin

    def _count(self) -> None:
        self._planned = None, None
        self.version += 1
        self.columns = max((end for _, end in self._ranges.values()), default=0)

    def _gather(self, layers: Mapping[str, Any]) -> None:
        """Puts layers that get the same input into one family, and tells each of them its own.

        A family that a layer joins is made anew, with the factors that it had.
        """
        there = {path: paths for paths in self._families for path in paths}
        for path, layer in layers.items():
            if path not in there:
                fusible = self._is_fusible(layer.base_layer)
                together = self._together.get(path, (path,)) if fusible else (path,)
                paths = tuple(p for p in together if p == path or self._may_join(p, there, layers))
                self._make(paths, None if fusible else layer.base_output)
                there |= dict.fromkeys(paths, paths)
        for path, layer in layers.items():
            family = self._families[there[path]]
            if layer.family is not family:
                layer.family, layer.place = family, there[path].index(path)
            if family.base is not None:
                family.base = layer.base_output

    def _make(self, paths: tuple[str, ...], base: Base | None) -> None:
        """A family of the layers at `paths`, in the place of those that some of them were in."""
        family = Family([self._base_of(path) for path in paths], self, base)
        own = [self.layers.get(path) for path in paths]
        for name, (begin, end) in self._ranges.items():
            given = [layer and layer.packed_factors(name, self.dtype) for layer in own]
            family.put(name, begin, end - begin, self.columns, given)
        for old in [old for old in self._families if set(old) & set(paths)]:
            del self._families[old]
        self._families[paths] = family
        for place, layer in enumerate(own):
            if layer is not None:
                layer.family, layer.place = family, place

    def _base_of(self, path: str) -> Any:
        """The base's own layer at a path."""
        layer: Any = self.layers[path] if path in self.layers else self._model.get_submodule(path)
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        return layer

    def _may_join(
        self, path: str, there: Mapping[str, tuple[str, ...]], layers: Mapping[str, Any]
    ) -> bool:
        if path in there:
            return self._families[there[path]].base is None
        return path in layers and self._is_fusible(layers[path].base_layer)

    def _is_fusible(self, layer: Any) -> bool:
        """Whether a layer is its weight and bias, of the model's dtype, and nothing else's."""
        return (
            (type(layer) is nn.Linear or type(layer).__name__ == "Conv1D")
            and type(layer.weight) is nn.Parameter
            and format_of(layer.weight) is None
            and all(p.dtype == self.dtype for p in layer.parameters())
            and not layer._forward_hooks
            and self._users[id(layer.weight)] == 1
        )


@torch.no_grad()
def same_inputs(model: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    """The paths of linear layers that get one and the same tensor while `run` calls the model.

    Layers that are called several times are left out.
    """
    calls: list[tuple[str, torch.Tensor]] = []

    def note(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, given: calls.append((path, given[0]))

    handles = [
        module.register_forward_pre_hook(note(path.replace(".base_layer", "")))
        for path, module in model.named_modules()
        if linear_shape(module) is not None and ".lora_" not in path
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
