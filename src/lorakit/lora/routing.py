"""Which adapter serves which row of a batch.

One `Routing` is shared by every wrapped layer of a model, so switching adapters, leaving them
out, adding several up, and giving every row its own are one assignment each. The layers read
the route; nothing else decides what they compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch

from lorakit.errors import InputError
from lorakit.lora.streams import Stream

BASE = "__base__"
"""The name that stands for "no adapter" in a list of names, one a row (PEFT's word)."""

FROZEN = "frozen"
"""Begins the names of frozen adapters that others are added to."""


class RoutePart(NamedTuple):
    """Neighbouring positions of a layer's input that have one adapter.

    Attributes:
        size: how many positions, along the dimension that `Route.parts` says.
        width: of each row only so many tokens are its own; None where all are.
        stream: what dropout is drawn from; None is PyTorch's own generator.
    """

    adapter: str
    size: int
    width: int | None = None
    stream: Stream | None = None


@dataclass(frozen=True)
class Route:
    """Either `shared` adapters for every row, or one adapter (or none) for each of the `rows`.

    Args:
        shared: the names whose updates are added up for every row; empty is the base alone.
        rows: one name a row, `"__base__"` for none; None when `shared` holds for all rows.
        shape: the model's input, as (batch, tokens in a row), where that is known.
        sizes: each of `rows` stands for so many neighbouring rows of the batch, or tokens of a
            batch that is one line; None for one row each. Layers compute every such part by
            itself, as they would a batch of its own.
        widths: of the rows of each of these parts only so many tokens are its own, and what comes
            behind them is padding, which its adapter does not see; None where all are.
        streams: what the adapter of each of `rows` draws its dropout from; empty where that is
            PyTorch's own generator.
    """

    shared: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None
    shape: tuple[int, int] | None = None
    sizes: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    streams: tuple[Stream | None, ...] = ()

    @classmethod
    def of_rows(cls, names: Sequence[str], shape: tuple[int, int] | None = None) -> Route:
        """The route that gives each row the adapter of its name, or `"__base__"`."""
        if len(set(names)) > 1:
            return cls(rows=tuple(names), shape=shape)
        return cls(shared=tuple(name for name in names[:1] if name != BASE))

    @cached_property
    def row_names(self) -> tuple[str, ...]:
        """The different adapters among `rows`, each once, in the order of their first row."""
        return tuple(dict.fromkeys(name for name in self.rows or () if name != BASE))

    def row_index(self, x: torch.Tensor, present: Sequence[str]) -> torch.Tensor:
        """For each row of `x` the position of its adapter in `present`, else `len(present)`.

        A batch that is a multiple of the rows has had each row repeated in place, as beam search
        does; one of two dimensions may have its tokens in a line, row after row.

        Shapes: x (batch, …) or (batch * tokens, d). Returns: int64, of the first dimension of x.

        Raises:
            InputError: it cannot be told which row each of these belongs to, as when a mixture of
                experts sends each expert some tokens, or several copies of all.
        """
        rows = self._names()
        self.require_rows(x)
        position = {name: i for i, name in enumerate(present)}
        index = torch.tensor([position.get(name, len(present)) for name in rows], device=x.device)
        return index.repeat_interleave(x.shape[0] // len(rows))

    def require_rows(self, x: torch.Tensor) -> None:
        """Raises InputError unless it can be told which row each of `x` belongs to."""
        rows, batch = sum(self.sizes or ()) or len(self.rows or ()), x.shape[0]
        known = self.shape is None or batch in (self.shape[0], self.shape[0] * self.shape[1])
        if batch % rows or not known:
            given = f"adapter_names has {rows} names"
            if self.sizes:
                given = f"adapters share a batch of {rows} rows or tokens"
            raise InputError(
                f"{given}, and a layer got {batch} rows, of which it cannot be told whose they "
                "are: adapt other modules, or run one adapter at a time"
            )

    def _names(self) -> tuple[str, ...]:
        """One name for each row of the batch."""
        if self.sizes is None:
            return self.rows or ()
        named = zip(self.rows or (), self.sizes, strict=True)
        return tuple(name for name, size in named for _ in range(size))

    def parts(self, x: torch.Tensor) -> tuple[int, list[RoutePart]]:
        """The dimension of `x` along which the parts lie, and the parts.

        Where rows have no `sizes`, neighbours with the same adapter are one part.

        Shapes: x (batch, …), (1, tokens, …) for a line, or (batch * tokens, d).

        Raises:
            InputError: it cannot be told which part each position belongs to.
        """
        rows, sizes = self._runs
        total, dim, each = sum(sizes), 0, 1
        if x.shape[0] != total and self.sizes is not None and tuple(x.shape[:2]) == (1, total):
            dim = 1
        elif x.shape[0] != total:
            self.require_rows(x)
            each = x.shape[0] // total
        widths: Sequence[int | None] = self.widths or (None,) * len(rows)
        if self.widths is not None and self.shape is not None:
            if tuple(x.shape[:2]) != self.shape and x.shape[0] != self.shape[0] * self.shape[1]:
                raise InputError(
                    "adapters share a batch of rows of different lengths, and a layer does not get "
                    "these rows: adapt other modules, or run one adapter at a time"
                )
            widths = [None if width == self.shape[1] else width for width in self.widths]
        streams = self.streams or (None,) * len(rows)
        found = zip(rows, sizes, widths, streams, strict=True)
        return dim, [RoutePart(name, each * n, width, stream) for name, n, width, stream in found]

    @cached_property
    def _runs(self) -> tuple[Sequence[str], Sequence[int]]:
        """The adapter of each part, and how many rows of the batch it has."""
        if self.sizes is not None:
            return self.rows or (), self.sizes
        runs = [(name, len(list(run))) for name, run in groupby(self.rows or ())]
        return [name for name, _ in runs], [size for _, size in runs]

    @cached_property
    def grouped(self) -> tuple[Route, tuple[int, ...]] | None:
        """The route of the same rows with each adapter's side by side, and these rows' numbers.

        None where they lie so already.
        """
        names, rows = self._runs[0], self.rows or ()
        if self.sizes is not None or len(names) == len(set(names)):
            return None
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return Route(rows=tuple(rows[i] for i in order), shape=self.shape), tuple(order)

    def order(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of `x` in the order of `grouped`, and where each is there: int64 (batch,).

        Raises:
            InputError: as `row_index`.
        """
        assert self.grouped is not None
        self.require_rows(x)
        rows = self.grouped[1]
        return _order(rows, x.shape[0] // len(rows), x.device)

    def again(self) -> Route:
        """This route with streams that give the same numbers once more from here on."""
        if not any(self.streams):
            return self
        return replace(self, streams=tuple(stream and stream.copy() for stream in self.streams))


@lru_cache(maxsize=16)  # of the latest batches; every layer of a model asks for the same one
def _order(
    rows: tuple[int, ...], each: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # they may be used in training next
        order = torch.tensor([row * each + i for row in rows for i in range(each)])
        return order.to(device), order.argsort().to(device)


class Routing:
    """The route in force, shared by all wrapped layers of one model."""

    def __init__(self, route: Route | None = None) -> None:
        self.chosen = route or Route()
        """The route that is in force as long as adapters are enabled."""
        self.enabled = True
        self.frozen = False
        """Whether adapters' values stay as they are, so that what follows of them may be kept."""
        self.recomputes_route = True
        """Whether activation checkpointing, if there is any, comes back to its forward's route."""

    @property
    def route(self) -> Route:
        """What the layers compute now; nothing but the base while adapters are disabled."""
        return self.chosen if self.enabled else Route()

    @route.setter
    def route(self, route: Route) -> None:
        self.chosen = route

    def checkpointing_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments for `torch.utils.checkpoint`: what is computed again takes the same route.

        That happens in the backward pass, when another route may be in force, and draws the same
        numbers for dropout again. The older, re-entrant form knows nothing of it; with that, rows
        cannot choose adapters in training.
        """
        self.recomputes_route = not options.get("use_reentrant")
        if not self.recomputes_route:
            return dict(options)
        return {**options, "use_reentrant": False, "context_fn": self._recomputing}

    def _recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self.using(self.route.again())

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Puts `route` in force for the duration of a block, unless adapters are disabled."""
        before, self.chosen = self.chosen, route
        try:
            yield
        finally:
            self.chosen = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Nothing but the base for the duration of a block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def rows(self, model: torch.nn.Module, names: Sequence[str]) -> Iterator[None]:
        """One adapter for each row of what `model` is given in a block.

        Within it the model may run several times, each row repeated in place, as in beam search.
        """

        def look(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if (x := first_tensor(args, kwargs)) is not None:
                shape = (x.shape[0], x.shape[1] if x.dim() > 1 else 1)
                self.chosen = Route(rows=tuple(names), shape=shape)

        handle = model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with self.using(Route(rows=tuple(names))):
                yield
        finally:
            handle.remove()


def require_one_per_row(
    adapter_names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raises InputError unless the batch among a call's arguments has a row for each name."""
    x = first_tensor(args, kwargs)
    if x is not None and len(x) != len(adapter_names):
        raise InputError(
            "the length of `adapter_names` should be the same as the number of inputs, and it has "
            f"{len(adapter_names)} names for a batch of {len(x)} rows"
        )


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The first of a call's arguments that has rows."""
    found = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim())
    return next(found, None)
