"""States of linear-attention, Mamba and convolution layers: what a row's tokens left, in one size.

A state has no positions: what was added cannot be taken back, so a forward that failed midway is
not repeated from it (`ContinuousBatch` reads such a row from its beginning).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer

from lorakit.engine.row_layers.place import Place


class StateRows(LinearAttentionLayer):
    """Recurrent states (rows, ...) and the last inputs of convolutions (rows, channels, kernel)."""

    needs_snapshots = True

    def __init__(self, rows: int, number_of_states: int = 1) -> None:
        super().__init__(number_of_states=number_of_states)
        self.place = Place()
        self._state_rows = rows

    def of_rows(self, states: dict[int, torch.Tensor | None], at: int) -> torch.Tensor | None:
        """The states of the rows in question, a view; None where they have no tokens yet."""
        found = states[at]
        return None if found is None or not self.place.continues else found[self.place.rows]

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Keeps the last of these inputs, and returns them behind those that the rows had."""
        kernel = conv_kernel_size or conv_states.shape[-1]
        kept = self._states_of(self.conv_states, state_idx, conv_states[..., :1], kernel)
        kernel = kept.shape[-1]
        before = self.of_rows(self.conv_states, state_idx)
        if before is not None:
            whole = torch.cat([before, conv_states], dim=-1)
        else:
            conv_states = self._without_padding(conv_states)
            missing = max(0, kernel - conv_states.shape[-1])
            whole = torch.nn.functional.pad(conv_states, (missing, 0))
        kept[self.place.rows] = whole[..., -kernel:]
        return whole

    def _without_padding(self, inputs: torch.Tensor) -> torch.Tensor:
        """Zeros where prompts are padded, which a bias before the convolution would fill."""
        width, lengths = inputs.shape[-1], self.place.prompts
        if min(lengths, default=width) == width:
            return inputs
        begins = width - torch.tensor(lengths, device=inputs.device)
        padding = torch.arange(width, device=inputs.device) < begins[:, None]
        return inputs.masked_fill(padding[:, None], 0)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Keeps the states of the rows in question, which may have been updated in their places."""
        kept = self._states_of(self.recurrent_states, state_idx, recurrent_states)[self.place.rows]
        if kept.data_ptr() != recurrent_states.data_ptr():
            kept.copy_(recurrent_states)
        return kept

    def _states_of(
        self,
        states: dict[int, torch.Tensor | None],
        at: int,
        like: torch.Tensor,
        last: int | None = None,
    ) -> torch.Tensor:
        found = states[at]
        if found is None:
            shape = [self._state_rows, *like.shape[1:]]
            if last is not None:
                shape[-1] = last
            found = states[at] = like.new_zeros(shape)
        return found

    def states(self) -> list[torch.Tensor]:
        """The tensors in which rows have places, (rows, ...)."""
        both = *self.conv_states.values(), *self.recurrent_states.values()
        return [tensor for tensor in both if tensor is not None]

    def clear(self, row: int, _length: int) -> None:
        """Puts zeros in a row's place."""
        for tensor in self.states():
            tensor[row] = 0

    def move(self, source: int, target: int, _length: int) -> None:
        """Copies a row into the place of another."""
        for tensor in self.states():
            tensor[target] = tensor[source]

    def part(self, _row: int, _begin: int, _end: int) -> list[torch.Tensor]:
        """A state has no positions."""
        return []

    def put_part(self, _row: int, _begin: int, _part: Sequence[torch.Tensor]) -> None:
        """There is none."""

    def snapshot(self, row: int, _length: int) -> list[Any]:
        """Copies of a row's states; None in the place of those that the layer does not have."""
        both = *self.conv_states.values(), *self.recurrent_states.values()
        return [None if tensor is None else tensor[row].clone() for tensor in both]

    def put_snapshot(self, row: int, snapshot: Sequence[Any]) -> None:
        """Gives a row such copies."""
        half = len(self.conv_states)
        for states, own in (
            (self.conv_states, snapshot[:half]),
            (self.recurrent_states, snapshot[half:]),
        ):
            for at, state in zip(states, own, strict=True):
                if state is not None:
                    self._states_of(states, at, state[None])[row] = state
