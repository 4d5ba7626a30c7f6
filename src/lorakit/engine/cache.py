"""What all rows have of the past, layer by layer, in one place that is made once.

A row has a place of its own in each layer's tensors (`row_layers/`). Rows in use are the first
ones, without gaps, so that a step of all of them reads views and copies nothing. A forward is
prepared by one of four methods (whole prompts, the rests of prompts, a part of a row, newest
tokens), which give the model's arguments; its layers then call `update` and the like, of
transformers' cache interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from sys import modules
from typing import Any

import torch
from transformers.cache_utils import Cache

from lorakit.engine import grouped_queries  # noqa: F401 (attention of `rests_of_prompts`)
from lorakit.engine.row_layers import row_layers
from lorakit.engine.row_layers.full import FullRows
from lorakit.engine.row_layers.place import Place
from lorakit.engine.row_masks import Seen

_FEW = 8


class RowCache(Cache):
    """What at most `rows` rows of at most `length` tokens have of the past.

    Attributes:
        keeps_states: a forward that failed cannot be repeated, since it may have changed them.
        needs_snapshots: a layer keeps something without positions, which is that of all tokens.
        reads_rests: whether `rests_of_prompts` can be asked for.
        own_mask: its layers have nothing but causal attention, by a mask that is made here.
        turns_with_length: how keys are rotated depends on how long their row is.
        arguments: the names of the model's arguments that it gives.

    Raises:
        ValueError: a layer of the model keeps something that is not known here.
    """

    def __init__(self, model: Any, rows: int, length: int) -> None:
        layers = row_layers(model.config, rows, length)
        Cache.__init__(self, layers=layers)
        self._name = argument(model) or ""
        self.arguments = {"input_ids", "position_ids", "attention_mask", self._name, "use_cache"}
        config = model.config.get_text_config()
        tuned = getattr(config, "attn_temperature_tuning", None)
        self._step = int(config.floor_scale) if tuned else 0
        self.keeps_states = any(hasattr(layer, "conv_states") for layer in layers)
        self.needs_snapshots = any(layer.needs_snapshots for layer in layers)
        # With nothing but causal attention the mask needs no help of the model.
        self.own_mask = config._attn_implementation != "eager" and all(
            type(layer) is FullRows for layer in layers
        )
        self.reads_rests = self.own_mask and not self._step
        self.turns_with_length = _turns_with_length(config)

    def are_alike(self, *positions: int) -> bool:
        """Whether rows at these positions can be computed together.

        Llama 4 scales queries by steps of their position, and counts it from the longest row.
        """
        return not self._step or len({(p + 1) // self._step for p in positions}) < 2

    def whole_prompts(
        self, first: int, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> dict[str, Any]:
        """The model's arguments for prompts of rows from `first` on, padded on the left."""
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        # Padding is the prompt's own token: nothing that the model would not compute anyway.
        ids = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        columns = torch.arange(width, device=device)
        begins = width - torch.tensor(lengths, device=device)[:, None]
        mask = None  # attention is causal then, from the first key on
        if len(prompts) > 1:
            mask = columns >= begins
            if self.own_mask:
                # Padding sees padding, as what sees nothing is NaN.
                alike = mask[:, None] == mask[:, :, None]
                mask = (alike & (columns <= columns[:, None]))[:, None]
            else:
                mask = mask.long()
        positions = (columns - begins).clamp_(min=0)
        return self._arguments(Place(first, prompts=lengths), ids, positions, mask)

    def rests_of_prompts(
        self,
        first: int,
        rests: Sequence[Sequence[int]],
        starts: Sequence[int],
        device: torch.device,
    ) -> dict[str, Any]:
        """The model's arguments for what is left of the prompts of rows from `first` on.

        Args:
            rests: their tokens, which are padded on the left.
            starts: how many tokens each row has before them.
        """
        counts = [len(rest) for rest in rests]
        width = max(counts)
        ids = [[rest[0]] * (width - len(rest)) + list(rest) for rest in rests]
        columns = torch.arange(width, device=device)
        begins = width - torch.tensor(counts, device=device)[:, None]
        positions = torch.tensor(starts, device=device)[:, None] + (columns - begins).clamp_(min=0)
        longest = max(start + count for start, count in zip(starts, counts, strict=True))
        before = torch.arange(longest, device=device)
        mask = (before <= positions[:, :, None])[:, None]
        place = Place(first, prompts=counts, starts=starts, longest=longest)
        return self._arguments(place, ids, positions, mask)

    def part_of_row(
        self, row: int, tokens: Sequence[int], start: int, device: torch.device, moved: int = 0
    ) -> dict[str, Any]:
        """The model's arguments for a row's tokens from its position `start` on.

        Args:
            moved: what is added to their positions as the model counts them.
        """
        end = start + len(tokens)
        positions = torch.arange(start, end, device=device)
        mask = None
        if start and self.own_mask:
            before = torch.arange(end, device=device)
            mask = (before <= positions[:, None])[None, None]
        return self._arguments(Place(row, start), [tokens], positions[None] + moved, mask)

    def newest_tokens(
        self,
        tokens: Sequence[int],
        lengths: Sequence[int],
        device: torch.device,
        moved: Sequence[int] = (),
    ) -> dict[str, Any]:
        """The model's arguments for one token of each row, which have these lengths before it.

        Args:
            moved: as in `part_of_row`, of each row; none where it is 0 for all.
        """
        before = torch.tensor(lengths, device=device)
        longest = max(lengths) + 1
        mask = None
        if self.own_mask:
            # Also where it hides nothing: with a mask a CPU takes the quicker of two ways.
            mask = (torch.arange(longest, device=device) <= before[:, None])[:, None, None]
        place = Place(lengths=before, longest=longest)
        positions = before + torch.tensor(moved, device=device) if any(moved) else before
        return self._arguments(place, [[token] for token in tokens], positions[:, None], mask)

    def _arguments(
        self,
        place: Place,
        ids: Sequence[Sequence[int]],
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> dict[str, Any]:
        """Tokens, positions, and a mask: (rows, 1, queries, keys) of what each token sees, or
        (rows, tokens) of what is no padding, with which the model makes its own."""
        for layer in self.layers:
            layer.place = place
        return {
            "input_ids": torch.tensor(ids, device=positions.device),
            "position_ids": positions,
            "attention_mask": mask,
            self._name: self,
            "use_cache": True,
        }

    def clear(self, row: int, length: int) -> None:
        """Puts zeros in a row's place, which has `length` tokens.

        NaN or Inf there would reach whoever gets the place next, through any mask.
        """
        for layer in self.layers:
            layer.clear(row, length)

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a row of `length` tokens into the place of another."""
        for layer in self.layers:
            layer.move(source, target, length)

    def part(self, row: int, begin: int, end: int) -> list[list[torch.Tensor]]:
        """Copies of what a row has of the positions [begin, end), (heads, positions, d) each."""
        return [layer.part(row, begin, end) for layer in self.layers]

    def put_part(self, row: int, begin: int, part: Sequence[Sequence[torch.Tensor]]) -> None:
        """Gives a row such copies, from its position `begin` on."""
        for layer, own in zip(self.layers, part, strict=True):
            layer.put_part(row, begin, own)

    def snapshot(self, row: int, length: int) -> list[list[torch.Tensor]]:
        """Copies of what a row that has read `length` tokens has without positions."""
        return [layer.snapshot(row, length) for layer in self.layers]

    def put_snapshot(self, row: int, snapshot: Sequence[Sequence[torch.Tensor]]) -> None:
        """Gives a row such copies."""
        for layer, own in zip(self.layers, snapshot, strict=True):
            layer.put_snapshot(row, own)

    def first_states(self) -> list[torch.Tensor]:
        """The states of all rows in the first layer that has some, (rows, ...)."""
        return next((layer.states() for layer in self.layers if hasattr(layer, "conv_states")), [])

    # --- what models and their masks ask ----------------------------------------------------

    @property
    def is_linear(self) -> list[bool]:
        """Which layers keep a state and no keys."""
        return [
            hasattr(layer, "conv_states") and not isinstance(layer, FullRows)
            for layer in self.layers
        ]

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The positions before the next forward's: a number, or each row's own (`Seen`)."""
        layer: Any = self.layers[layer_idx]
        if not isinstance(layer, FullRows):  # as `get_mask_sizes` and `get_seq_length` do
            layer = next(layer for layer in self.layers if isinstance(layer, FullRows))
        if (lengths := layer.place.lengths) is None:
            return layer.get_seq_length()
        return Seen(lengths[:, None], layer.positions())

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The last inputs of the rows in question; None where they have no tokens yet."""
        layer: Any = self.layers[layer_idx]
        return layer.of_rows(layer.conv_states, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The states of the rows in question; None where they have no tokens yet."""
        layer: Any = self.layers[layer_idx]
        return layer.of_rows(layer.recurrent_states, state_idx)

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        """As `get_recurrent_state`, of MiniMax-01's lightning attention."""
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        """Keeps the states of the rows in question."""
        layer: Any = self.layers[layer_idx]
        layer.update_recurrent_state(linear_cache)

    def __len__(self) -> int:
        return len(self.layers)

    def has_previous_state(
        self, layer_idx: int | None = None, state_idx: int | None = None
    ) -> bool:
        """Whether the rows in question have tokens before the next forward's."""
        return self.layers[layer_idx or 0].place.continues


def row_cache(model: Any, rows: int, length: int) -> RowCache:
    """A `RowCache`; MiniMax-01 takes only caches of a class of its own, so that it is one too."""
    own = getattr(modules[type(model).__module__], "MiniMaxCache", None)
    kind = type("RowCache", (RowCache, own), {}) if own is not None else RowCache
    made: RowCache = kind(model, rows, length)
    return made


@torch.inference_mode()
def bytes_of_row(model: Any) -> tuple[int, int]:
    """About how much a row takes, and how much more for each token: a forward of one tells."""
    cache = row_cache(model, 1, _FEW)
    model(**cache.whole_prompts(0, [[0]], model.device))
    states = sum(t.nbytes for own in cache.snapshot(0, 1) for t in own if t is not None)
    layers = (layer for layer in cache.layers if isinstance(layer, FullRows))
    return states, sum(t.nbytes for layer in layers for t in layer.kept()) // _FEW


def argument(model: Any) -> str | None:
    """The name under which a model takes a cache; None of one that takes none."""
    taken = signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in taken), None)


def _turns_with_length(config: Any) -> bool:
    """Whether rotary frequencies depend on the length (dynamic NTK, LongRoPE)."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(own for own in rope.values() if isinstance(own, dict))]
    return any(own.get("rope_type", own.get("type")) in ("dynamic", "longrope") for own in kinds)
