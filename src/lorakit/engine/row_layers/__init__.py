"""What a layer of a model keeps of the rows in a `RowCache`, one file a kind of layer.

Which kind a layer is says transformers' own cache for the model: each of its classes has one here
that keeps the same for rows which join, leave and grow on their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import DynamicCache

from lorakit.engine.row_layers.full import FullRows
from lorakit.engine.row_layers.window import WindowRows


def _full(_like: Any, rows: int, length: int) -> Any:
    return FullRows(rows, length)


def _window(like: Any, rows: int, length: int) -> Any:
    return WindowRows(rows, length, like.sliding_window)


def _indexed(_like: Any, rows: int, length: int) -> Any:
    from lorakit.engine.row_layers.indexed import IndexedRows

    return IndexedRows(rows, length)


def _states(like: Any, rows: int, _length: int) -> Any:
    from lorakit.engine.row_layers.states import StateRows

    return StateRows(rows, like.number_of_states)


def _states_and_full(like: Any, rows: int, length: int) -> Any:
    from lorakit.engine.row_layers.hybrid import StateAndFullRows

    return StateAndFullRows(rows, length, like.number_of_states)


def _states_and_window(like: Any, rows: int, length: int) -> Any:
    from lorakit.engine.row_layers.hybrid import StateAndWindowRows

    return StateAndWindowRows(rows, length, like.sliding_window, like.number_of_states)


def _nothing(_like: Any, _rows: int, _length: int) -> Any:
    from lorakit.engine.row_layers.nothing import NoRows

    return NoRows()


LAYERS: dict[str, Callable[[Any, int, int], Any]] = {
    "DynamicLayer": _full,
    "DynamicSlidingWindowLayer": _window,
    "DynamicIndexedLayer": _indexed,
    "LinearAttentionLayer": _states,
    "LinearAttentionAndFullAttentionLayer": _states_and_full,
    "LinearAttentionAndSlidingWindowAttentionLayer": _states_and_window,
    "DummyLayer": _nothing,
}
"""By the name of transformers' class. Those that its older releases lack are imported when used."""


def row_layers(config: Any, rows: int, length: int) -> list[Any]:
    """The layers of a cache for `rows` rows of at most `length` tokens.

    Raises:
        ValueError: a layer of the model keeps something that is not known here.
    """
    made = []
    for like in DynamicCache(config=config).layers:
        name = type(like).__name__
        if name not in LAYERS:
            raise ValueError(f"its layers keep their past as {name}")
        made.append(LAYERS[name](like, rows, length))
    return made
