"""Which adapter serves which row of a batch.

One `Routing` is shared by every wrapped layer of a model, so switching adapters, leaving them
out, adding several up, and giving every row its own are one assignment each. The layers read
the route; nothing else decides what they compute.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from lorakit.errors import InputError

BASE = "__base__"
"""The name that stands for "no adapter" in a list of names, one a row (PEFT's word)."""


@dataclass(frozen=True)
class Route:
    """Either `shared` adapters for every row, or one adapter (or none) for each of the `rows`.

    Args:
        shared: the names whose updates are added up for every row; empty is the base alone.
        rows: one name a row, `"__base__"` for none; None when `shared` holds for all rows.
    """

    shared: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None

    @cached_property
    def row_names(self) -> tuple[str, ...]:
        """The different adapters among `rows`, each once, in the order of their first row."""
        return tuple(dict.fromkeys(name for name in self.rows or () if name != BASE))

    def row_index(self, batch: int, present: Sequence[str], device: torch.device) -> torch.Tensor:
        """For each of `batch` rows the position of its adapter in `present`, else `len(present)`.

        A batch that is a multiple of the rows has had each row repeated in place, as beam search
        and flattened token dimensions do.

        Returns: (batch,) int64.
        """
        rows = self.rows or ()
        if batch % len(rows):
            raise InputError(f"adapter_names has {len(rows)} names for a batch of {batch} rows")
        position = {name: i for i, name in enumerate(present)}
        index = torch.tensor([position.get(name, len(present)) for name in rows], device=device)
        return index.repeat_interleave(batch // len(rows))


def require_one_per_row(
    adapter_names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Raises InputError unless the batch among a call's arguments has a row for each name."""
    usual = ("input_ids", "inputs_embeds", "inputs", "x", "pixel_values", "input_values")
    batches = [*args[:1], *(kwargs.get(name) for name in usual)]
    rows = next((len(batch) for batch in batches if isinstance(batch, torch.Tensor)), None)
    if rows not in (None, len(adapter_names)):
        raise InputError(f"adapter_names has {len(adapter_names)} names for a batch of {rows} rows")


@dataclass
class Routing:
    """The route in force, shared by all wrapped layers of one model."""

    route: Route = field(default_factory=Route)

    def checkpointing_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments for `torch.utils.checkpoint`: what is computed again takes the same route.

        That happens in the backward pass, when another route may be in force.
        """
        if options.get("use_reentrant"):
            raise InputError("use_reentrant=True gives adapters no gradients: leave it out")
        return {**options, "use_reentrant": False, "context_fn": self._recomputing}

    def _recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self.using(self.route)

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Puts `route` in force for the duration of a block."""
        before, self.route = self.route, route
        try:
            yield
        finally:
            self.route = before
