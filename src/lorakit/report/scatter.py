"""Values against what they gave: one setting beside a loss, and all settings side by side.

As in `charts`, what is drawn is geometry in per cent of the plot, which a template places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.report.charts import HEIGHT, WIDTH, Chart, Hit, Tick, plain, scale, strips
from lorakit.report.numbers import figures, value_text

MOST_PLACES = 8  # values of a setting that have a place each; more numbers lie on a scale


@dataclass(frozen=True)
class Spot:
    """One configuration: its value of a setting, what it gave, and the class it is drawn with."""

    name: str
    value: Any
    result: float
    kind: str


@dataclass(frozen=True)
class Axis:
    """Where the values of a setting lie, from 0 to 1, and what is written there."""

    name: str
    place: Callable[[Any], float]
    ticks: list[Tick]


@dataclass(frozen=True)
class ParallelChart:
    """Upright axes from left to right, and a line through each configuration's values."""

    summary: str
    axes: list[tuple[float, Axis]]
    paths: list[tuple[str, str]]
    width: float = WIDTH
    height: float = HEIGHT


def axis_of(name: str, values: Sequence[Any]) -> Axis:
    """An axis for these values: places for a few, a scale for many numbers."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    distinct = sorted(set(numbers))
    if len(numbers) == len(values) and len(distinct) > MOST_PLACES:
        by = scale(distinct[0], distinct[-1], False)
        return Axis(name, by, by.across(plain))
    ordered = distinct if len(numbers) == len(values) else values
    texts = list(dict.fromkeys(map(value_text, ordered)))
    at = {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}
    ticks = [Tick(100 * place, text) for text, place in at.items()]
    return Axis(name, lambda value: at[value_text(value)], ticks)


def scatter(title: str, spots: Sequence[Spot]) -> Chart:
    """What each value of a setting gave, a dot a configuration."""
    axis = axis_of(title, [spot.value for spot in spots])
    results = [spot.result for spot in spots]
    y = scale(min(results), max(results), False)
    paths = [
        (
            f"{spot.kind} dot",
            f"M{axis.place(spot.value) * WIDTH:.1f} {(1 - y(spot.result)) * HEIGHT:.1f}h0",
        )
        for spot in spots
    ]
    return Chart(
        title,
        f"{title}: {figures(min(results))} to {figures(max(results))} over {len(spots)} "
        "configurations",
        paths=paths,
        x_ticks=axis.ticks,
        y_ticks=y.upright(plain),
        hits=_hits(spots, axis),
        notes=["log scale"] if y.log else [],
    )


def parallel(
    names: Sequence[str], rows: Sequence[tuple[str, Sequence[Any], float]], result: str
) -> ParallelChart:
    """All settings side by side, the result as the last axis.

    Args:
        names: of the settings.
        rows: of each configuration the class it is drawn with, its values, and its result.
        result: what the last axis is called; a smaller one is higher up.
    """
    axes = [axis_of(name, [values[i] for _, values, _ in rows]) for i, name in enumerate(names)]
    results = [value for _, _, value in rows]
    by = scale(min(results), max(results), False)
    axes.append(Axis(result, lambda v: 1 - by(v), by.upright(plain)))
    across = [i / (len(axes) - 1) for i in range(len(axes))]
    paths = []
    for kind, values, value in rows:
        spots = [
            f"{x * WIDTH:.1f} {(1 - axis.place(v)) * HEIGHT:.1f}"
            for x, axis, v in zip(across, axes, [*values, value], strict=True)
        ]
        paths.append((kind, "M" + "L".join(spots)))
    placed = list(zip([100 * x for x in across], axes, strict=True))
    return ParallelChart(f"{len(rows)} configurations over {', '.join(names)}", placed, paths)


def _hits(spots: Sequence[Spot], axis: Axis) -> list[Hit]:
    """A strip around each value, saying what its configurations gave, the least first."""
    by_place: dict[float, list[Spot]] = {}
    for spot in spots:
        by_place.setdefault(axis.place(spot.value), []).append(spot)
    return strips(
        (
            place,
            [
                f"{figures(spot.result)} {spot.name}"
                for spot in sorted(there, key=lambda spot: spot.result)[:12]
            ],
        )
        for place, there in sorted(by_place.items())
    )
