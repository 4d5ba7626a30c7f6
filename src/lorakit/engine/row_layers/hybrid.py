"""Layers with attention and a state side by side (Falcon-H1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.engine.row_layers.full import FullRows
from lorakit.engine.row_layers.states import StateRows
from lorakit.engine.row_layers.window import WindowRows


class StateAndFullRows(FullRows, StateRows):
    """Keys and values of all positions, and a state."""

    needs_snapshots = True

    def __init__(self, rows: int, length: int, number_of_states: int) -> None:
        FullRows.__init__(self, rows, length)
        StateRows.__init__(self, rows, number_of_states)

    def clear(self, row: int, length: int) -> None:
        super().clear(row, length)
        StateRows.clear(self, row, length)

    def move(self, source: int, target: int, length: int) -> None:
        super().move(source, target, length)
        StateRows.move(self, source, target, length)

    def snapshot(self, row: int, length: int) -> list[Any]:
        return [*super().snapshot(row, length), *StateRows.snapshot(self, row, length)]

    def put_snapshot(self, row: int, snapshot: Sequence[Any]) -> None:
        states = 2 * self.number_of_states
        super().put_snapshot(row, snapshot[:-states])
        StateRows.put_snapshot(self, row, snapshot[-states:])


class StateAndWindowRows(StateAndFullRows, WindowRows):
    """Keys and values of a window, and a state."""

    def __init__(self, rows: int, length: int, window: int, number_of_states: int) -> None:
        WindowRows.__init__(self, rows, length, window)
        self.needs_snapshots = True
        StateRows.__init__(self, rows, number_of_states)
