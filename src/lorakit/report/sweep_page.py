"""`sweep.html`: a sweep's table and its pictures, in one file that needs nothing else.

All of it comes from the leaderboard and the training losses. Pointing at a row of the table brings
out its configuration in every picture, by the style sheet alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit import atomic
from lorakit.folder_name import folder_name
from lorakit.report import numbers
from lorakit.report.charts import Chart, Line, line_chart
from lorakit.report.run_page import environment
from lorakit.report.scatter import Spot, parallel, scatter, value_text
from lorakit.version import __version__

PAGE_NAME = "sweep.html"

_KINDS = {"winner": "second", "finished": "first", "stopped": "faint"}
_MOST_POINTED = 16  # lines of what is said where a curve is pointed at


TrainLosses = Mapping[str, Sequence[tuple[int, float]]]
"""Of each configuration, by its name: step and mean nats per supervised token."""


def write_sweep_page(folder: Path, table: dict[str, Any], losses: TrainLosses) -> None:
    """Writes the page of the sweep in `folder`.

    Args:
        table: as in `leaderboard.json`.
    """
    page = environment().get_template("sweep.html.jinja").render(_content(folder, table, losses))
    # Half of a surrogate pair, which JSON can hold, is no character.
    atomic.write_file(folder / PAGE_NAME, page.encode(errors="replace"))


def _content(folder: Path, table: dict[str, Any], losses: TrainLosses) -> dict[str, Any]:
    """All that the template names."""
    rows = table["configurations"]
    keys = list(table["sweep"]["over"])
    share = _common_share(rows)
    return {
        "version": __version__,
        "name": folder_name(folder),
        "table": table,
        "rows": rows,
        "keys": keys,
        "key_figures": _key_figures(table),
        "curves": _curves(table, losses),
        "scatters": _scatters(rows, keys, share),
        "parallel": _parallel(rows, keys),
        "share": share,
        "span": _span(rows),
        "value_text": value_text,
        "numbers": numbers,
    }


def _key_figures(table: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value, and what else there is to say of it."""
    winner, base, steps = table["configurations"][0], table["base"], table["steps"]
    report = winner["report"]
    rungs = winner["rungs"][-1]
    gain = base["report"]["mean"] - rungs["report"]
    found = [
        ("Winner", winner["name"], f"of {len(table['configurations'])} configurations"),
        (
            "Held-out loss" if table["objective"] == "loss" else table["objective"],
            numbers.figures(report["mean"], 4),
            f"{numbers.figures(report['low'], 4)} to {numbers.figures(report['high'], 4)} in 95 % "
            "of draws",
        ),
        (
            "Gain over the base",
            numbers.figures(gain),
            f"nats a token, from {numbers.figures(base['report']['mean'], 4)}",
        ),
        (
            "Steps saved",
            numbers.share(steps["saved"], 1),
            f"{steps['done']:,} of {steps['planned']:,} were trained",
        ),
    ]
    if table["ranks"] and table["ranks"]["chosen"]:
        chosen = table["ranks"]["chosen"]
        kept = numbers.share(chosen["kept"]["report"], 1)
        found.append(("Rank that does", f"{chosen['r']}", f"keeps {kept} of the gain"))
    return found


def _curves(table: dict[str, Any], losses: TrainLosses) -> list[Chart]:
    """Held-out and training losses of all over steps, the winner on top."""
    rows = list(enumerate(table["configurations"]))[::-1]
    base = table["base"]["selection"]["mean"]
    held_out, training = [], []
    for i, row in rows:
        kind = f"{_KINDS.get(row['status'], 'faint')} c{i}"
        points = [(rung["step"], rung["selection"]) for rung in row["rungs"]]
        if points:
            held_out.append(Line(row["name"], kind, [(0.0, base), *points]))
        logged = [(float(step), loss) for step, loss in losses[row["name"]] if math.isfinite(loss)]
        training.append(Line(row["name"], kind, logged))
    charts = (line_chart("Held-out loss", held_out), line_chart("Training loss", training))
    return [_with_kinds(chart) for chart in charts if chart]


def _with_kinds(chart: Chart) -> Chart:
    """One key for each kind of line, and no more said at a place than can be read."""
    hits = [
        replace(hit, lines=hit.lines[:1] + hit.lines[:0:-1][:_MOST_POINTED]) for hit in chart.hits
    ]
    return replace(chart, legend=[(kind, status) for status, kind in _KINDS.items()], hits=hits)


def _common_share(rows: list[dict[str, Any]]) -> float:
    """The largest share of their runs at which all that did not diverge were looked at."""
    shares = [{rung["share"] for rung in row["rungs"]} for row in rows if row["diverged"] is None]
    return max(set.intersection(*shares))


def _scatters(rows: list[dict[str, Any]], keys: list[str], share: float) -> list[Chart]:
    """The loss against each setting, where all were looked at."""
    charts = []
    for key in keys:
        spots = [
            Spot(row["name"], row["changes"][key], rung["selection"], f"{_kind(row)} c{i}")
            for i, row in reversed(list(enumerate(rows)))
            for rung in row["rungs"]
            if rung["share"] == share
        ]
        charts.append(scatter(key, spots))
    return charts


def _parallel(rows: list[dict[str, Any]], keys: list[str]) -> Any:
    """All settings beside the loss that each configuration came to."""
    lines = [
        (f"{_kind(row)} c{i}", [row["changes"][key] for key in keys], row["rungs"][-1]["selection"])
        for i, row in reversed(list(enumerate(rows)))
        if row["rungs"]
    ]
    return parallel(keys, lines, "loss")


def _kind(row: dict[str, Any]) -> str:
    return _KINDS.get(row["status"], "faint")


def _span(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Between which values the intervals of the table lie."""
    found = [row["report"] for row in rows if row["report"]]
    low, high = min(x["low"] for x in found), max(x["high"] for x in found)
    return low, max(high, low + 1e-12)
