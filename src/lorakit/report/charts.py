"""Curves and histograms as geometry: paths, ticks and labels, placed in per cent of the plot.

The template draws them. An SVG is stretched over the plot's width while labels are text of the
page, so that both are as sharp and as large on a phone as on a wide screen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from lorakit.report.numbers import figures

MOST_POINTS = 1000  # a curve of more points is thinned to at most so many
_LOG_FROM = 30  # the ratio of largest to smallest value from which a scale is logarithmic
WIDTH, HEIGHT = 1000.0, 400.0  # of the drawing, in its own units
_MOST_HITS = 60  # places that can be pointed at

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve; `kind` is its class in the style sheet, `points` are (x, y) by rising x."""

    name: str
    kind: str
    points: list[Point]


@dataclass(frozen=True)
class Band:
    """An area between two curves with the same x; how wide it is says how sure a curve is."""

    name: str
    low: list[Point]
    high: list[Point]


@dataclass(frozen=True)
class Tick:
    """A label of an axis, so many per cent from the left or from the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Hit:
    """A strip of the plot that can be pointed at, in per cent from the left, and what it says."""

    left: float
    width: float
    lines: list[str]


@dataclass(frozen=True)
class Chart:
    """A drawing: SVG paths by class, rectangles, ticks, and what it says in words."""

    title: str
    summary: str
    legend: list[tuple[str, str]] = field(default_factory=list)
    paths: list[tuple[str, str]] = field(default_factory=list)
    bars: list[tuple[float, float, float, float]] = field(default_factory=list)
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    mark: Tick | None = None
    notes: list[str] = field(default_factory=list)
    width: float = WIDTH
    height: float = HEIGHT


@dataclass(frozen=True)
class Scale:
    """From values to the share of an axis, 0 to 1."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)

    def across(self, text: Callable[[float], str]) -> list[Tick]:
        """The ticks of an axis from left to right."""
        return [Tick(100 * self(value), text(value)) for value in self.ticks]

    def upright(self, text: Callable[[float], str]) -> list[Tick]:
        """The ticks of an axis from the bottom up."""
        return [Tick(100 * (1 - self(value)), text(value)) for value in self.ticks]


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    from_zero: bool = False,
    text: Callable = figures,
    bands: Sequence[Band] = (),
) -> Chart | None:
    """Curves over the optimiser's steps, from step 0; None where no line has a point.

    Bands lie behind them.

    The scale is logarithmic where values span a factor of 30 and zero need not be in sight.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    values = [y for line in lines for _, y in line.points]
    values += [y for band in bands for _, y in (*band.low, *band.high)]
    y = scale(min(values), max(values), from_zero)
    x = scale(0, max(max(line.points[-1][0] for line in lines), 1), True, snug=True)
    notes = ["log scale"] if y.log else []
    paths = []
    for band in bands:
        around = [(x(a) * WIDTH, (1 - y(b)) * HEIGHT) for a, b in (*band.low, *band.high[::-1])]
        paths.append(("band", "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in around) + "Z"))
    for line in lines:
        shown = thinned(line.points)
        if len(shown) < len(line.points):
            notes.append(f"{line.name}: {len(shown)} of {len(line.points)} points are drawn")
        spots = [(x(a) * WIDTH, (1 - y(b)) * HEIGHT) for a, b in shown]
        if line.kind.startswith("dots") or len(spots) == 1:
            # A stroke without length has round ends only: a dot that stretching leaves round.
            paths.append((f"{line.kind} dot", "".join(f"M{a:.1f} {b:.1f}h0" for a, b in spots)))
        if len(spots) > 1:
            paths.append((line.kind, "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in spots)))
    named = [line for line in lines if line.name]
    first_to_last = "; ".join(
        f"{line.name} {text(line.points[0][1])} to {text(line.points[-1][1])}" for line in named
    )
    return Chart(
        title,
        f"{title} over steps {lines[0].points[0][0]:g} to {lines[0].points[-1][0]:g}: "
        + first_to_last,
        legend=_legend(named, bands),
        paths=paths,
        x_ticks=x.across("{:,g}".format),
        y_ticks=y.upright(plain if text is figures else text),
        hits=_hits(named, x, text),
        notes=notes,
    )


def histogram(
    title: str, bins: Sequence[tuple[float, float, int]], cut: float | None
) -> Chart | None:
    """Counts over lengths, and where rows are cut; None without a bin that has width.

    Args:
        bins: (from, up to, count), by rising length.
        cut: the length at which longer rows are cut.
    """
    bins = [(low, high, n) for low, high, n in bins if high > low]
    if not bins:
        return None
    right = max(high for _, high, _ in bins)
    notes = []
    if cut and cut <= 3 * right:
        right = max(right, cut)
    elif cut:
        notes.append(f"rows would be cut at {cut:,g} tokens, far to the right of this")
    x = scale(0, right, True, snug=True)
    y = scale(0, max(n for _, _, n in bins), True)
    bars, hits = [], []
    for low, high, n in bins:
        left, width, height = x(low), x(high) - x(low), y(n)
        gap = min(2.0, 0.1 * width * WIDTH)
        bars.append((left * WIDTH, (1 - height) * HEIGHT, width * WIDTH - gap, height * HEIGHT))
        says = [f"{low:,g} to {high - 1:,g} tokens", f"{n:,} {'row' if n == 1 else 'rows'}"]
        hits.append(Hit(100 * left, 100 * width, says))
    shown_cut = cut if cut and not notes else None
    rows = sum(n for _, _, n in bins)
    return Chart(
        title,
        f"{title}: {rows:,} rows from {bins[0][0]:,g} to {bins[-1][1] - 1:,g} tokens",
        bars=bars,
        x_ticks=x.across("{:,g}".format),
        y_ticks=replace(y, ticks=[v for v in y.ticks if v == int(v)]).upright("{:,g}".format),
        hits=hits,
        mark=Tick(100 * x(shown_cut), f"cut at {shown_cut:,g}") if shown_cut else None,
        notes=notes,
    )


def thinned(points: Sequence[Point], limit: int = MOST_POINTS) -> list[Point]:
    """At most `limit` points: the lowest and the highest of each stretch, the ends included."""
    if len(points) <= limit:
        return list(points)
    inner, stretches = points[1:-1], limit // 2 - 1
    edges = [round(i * len(inner) / stretches) for i in range(stretches + 1)]
    kept = [points[0]]
    for start, end in pairwise(edges):
        stretch = inner[start:end]
        extremes = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept.extend(sorted(extremes))
    return [*kept, points[-1]]


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of `window` values around each point; of fewer at the ends."""
    half = window // 2
    around = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    means = [sum(y for _, y in near) / len(near) for near in around]
    return [(x, mean) for (x, _), mean in zip(points, means, strict=True)]


def _legend(lines: Sequence[Line], bands: Sequence[Band]) -> list[tuple[str, str]]:
    shown = [(line.kind, line.name) for line in lines] + [("band", band.name) for band in bands]
    return shown if len(shown) > 1 else []


def _hits(lines: Sequence[Line], x: Scale, text: Callable) -> list[Hit]:
    """Strips around at most 60 of the steps, each saying the values that are logged there."""
    steps = sorted({a for line in lines for a, _ in line.points})
    steps = steps[:: math.ceil(len(steps) / _MOST_HITS)]
    by_step = [(line.name, dict(line.points)) for line in lines]
    return strips(
        (x(a), [f"step {a:,g}", *(f"{name} {text(at[a])}" for name, at in by_step if a in at)])
        for a in steps
    )


def strips(said: Iterable[tuple[float, list[str]]]) -> list[Hit]:
    """Tooltips by place, 0 to 1 in rising order; each strip ends halfway to the next place."""
    said = list(said)
    edges = [0.0, *((a + b) / 2 for (a, _), (b, _) in pairwise(said)), 1.0]
    return [
        Hit(100 * left, 100 * (right - left), lines)
        for (_, lines), (left, right) in zip(said, pairwise(edges), strict=True)
    ]


def scale(low: float, high: float, from_zero: bool, snug: bool = False) -> Scale:
    """An axis with round ticks; `snug` ends it at `high` and not at the tick after it."""
    if low > 0 and high / low >= _LOG_FROM and not from_zero:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        ticks = [10.0**n for n in range(first, last + 1)]
        ticks = ticks[:: math.ceil(len(ticks) / 6)]
        low, high = max(ticks[0], low / 1.5), min(10.0**last, high * 1.5)
        return Scale(low, high, [t for t in ticks if low <= t <= high], log=True)
    if from_zero:
        low = min(low, 0.0)
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = _round_step((high - low) / 4)
    start, stop = math.floor(low / step), math.ceil(high / step - 1e-9)
    ticks = [n * step for n in range(start, stop + 1)]
    if snug:
        return Scale(low, high, [t for t in ticks if low <= t <= high])
    return Scale(ticks[0], ticks[-1], ticks)


def plain(value: float) -> str:
    """A tick's label: no more figures than it has."""
    return f"{value:,.6g}".replace("e-0", "e-").replace("e+0", "e")


def _round_step(rough: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten that is not below `rough`."""
    size = 10.0 ** math.floor(math.log10(rough))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
