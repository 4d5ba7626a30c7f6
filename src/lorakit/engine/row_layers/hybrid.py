"""Layers with attention and a state side by side (Falcon-H1)."""

from __future__ import annotations

from lorakit.engine.row_layers.full import FullRows
from lorakit.engine.row_layers.states import StateRows
from lorakit.engine.row_layers.window import WindowRows


class StateAndFullRows(FullRows, StateRows):
    """Keys and values of all positions, and a state."""

    def __init__(self, rows: int, length: int, number_of_states: int) -> None:
        FullRows.__init__(self, rows, length)
        StateRows.__init__(self, rows, number_of_states)

    def clear(self, row: int, length: int) -> None:
        super().clear(row, length)
        StateRows.clear(self, row, length)

    def move(self, source: int, target: int, length: int) -> None:
        super().move(source, target, length)
        StateRows.move(self, source, target, length)


class StateAndWindowRows(StateAndFullRows, WindowRows):
    """Keys and values of a window, and a state."""

    def __init__(self, rows: int, length: int, window: int, number_of_states: int) -> None:
        WindowRows.__init__(self, rows, length, window)
        StateRows.__init__(self, rows, number_of_states)
