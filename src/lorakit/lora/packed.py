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
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from lorakit.lora.columns import Columns, Plan
from lorakit.lora.routing import BASE, Route, Routing
from lorakit.weight_formats import format_of

FEW_TOKENS = 16
"""So many tokens of one adapter at most are multiplied by a copy of B in A's dtype."""

Base = Callable[[torch.Tensor], torch.Tensor]
"""A layer's own product of x (rows, …, d_in), with its bias: (rows, …, d_out)."""


class Family:
    """Layers that get the same input, and the factors of every packed adapter for them.

    One product then serves them all. An adapter's columns are those of the first layer, then those
    of the next; of B they are zero in the rows of the other layers.

    Args:
        base: what computes the only layer where its weight cannot lie here; None where the layers'
            weights, plain matrices of no other module's, lie here too.
    """

    def __init__(
        self, layers: Sequence[nn.Module], factors: PackedFactors, base: Base | None
    ) -> None:
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
