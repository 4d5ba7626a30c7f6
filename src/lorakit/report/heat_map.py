"""Values of modules as heat maps: rows are layers, columns are kinds of module.

A path is cut at its first number: `model.layers.3.self_attn.q_proj` is layer 3, kind `q_proj`.
Here are places, texts and shades; the template draws a table of them, which can be read too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

LEVELS = 9  # how many shades there are; the style sheet has a colour for each, in light and in dark

# In the order of a block's computation; a file has its modules in that of the alphabet.
_USUAL = [
    *("q", "k", "v", "qkv", "query", "key", "value", "c_attn", "o", "out"),
    *("gate", "up", "gate_up", "down", "fc1", "fc2"),
]


@dataclass(frozen=True)
class Cell:
    """One place of a heat map: what it shows, what it says when pointed at, and its shade."""

    text: str
    title: str
    level: int


@dataclass(frozen=True)
class Grid(Generic[T]):
    """A list of layers (`model.layers`), or the modules outside of any, as a table.

    `rows` are the number of each layer, and for each column what is there.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[T]]]


def heat_maps(
    values: Mapping[str, float], top: float, text: Callable[[float], str], says: str
) -> list[Grid[Cell | None]]:
    """Heat maps of one value a module, shades evenly from 0 to `top`, the last for all above.

    Where a layer has several modules of a kind, the cell is their mean; where it has none, None.

    Args:
        values: by the module's path in the base model.
        text: how a value is written.
        says: what a value is and its unit, for those who point at a cell.
    """

    def cell(paths: list[str]) -> Cell | None:
        known = [values[path] for path in paths if path in values]
        if not known:
            return None
        mean = sum(known) / len(known)
        who = paths[0] if len(paths) == 1 else f"mean of {len(known)} modules like {paths[0]}"
        level = min(LEVELS - 1, int(LEVELS * mean / top)) if top > 0 else 0
        return Cell(text(mean), f"{who}: {says}: {text(mean)}", level)

    return [
        Grid(grid.title, grid.columns, [(row, [*map(cell, there)]) for row, there in grid.rows])
        for grid in grids(values)
    ]


def grids(paths: Iterable[str]) -> list[Grid[list[str]]]:
    """The paths laid out, one grid a list of layers; what is in none of them comes last.

    A cell has several where a layer has a list of the same modules (experts).
    """
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for path in paths:
        title, row, kind = _place(path)
        found.setdefault(title, {}).setdefault((row, kind), []).append(path)
    return [_grid(title, found[title]) for title in sorted(found, key=lambda t: t == "")]


def _place(path: str) -> tuple[str, str, str]:
    """The list of layers, the layer's number, and the kind of the module at `path`."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None or first == len(parts) - 1:
        return "", "", path
    # A list within the layer (its experts) is one kind.
    kind = ".".join("*" if part.isdecimal() else part for part in parts[first + 1 :])
    return ".".join(parts[:first]), parts[first], kind


def _grid(title: str, places: Mapping[tuple[str, str], list[str]]) -> Grid[list[str]]:
    rows = list(dict.fromkeys(row for row, _ in places))
    rows.sort(key=lambda row: int(row or 0))
    kinds = sorted(dict.fromkeys(kind for _, kind in places), key=_usual_order)
    cells = [(row, [places.get((row, kind), []) for kind in kinds]) for row in rows]
    return Grid(title, [_short(kind, kinds) for kind in kinds], cells)


def _usual_order(kind: str) -> int:
    name = kind.rpartition(".")[2].removesuffix("_proj")
    return _USUAL.index(name) if name in _USUAL else len(_USUAL)


def _short(kind: str, kinds: list[str]) -> str:
    """The shortest end of `kind` that no other kind has."""
    parts = kind.split(".")
    ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
    alone = (e for e in ends if sum(f".{other}".endswith(f".{e}") for other in kinds) == 1)
    return next(alone, kind)
