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

from lorakit.folder_name import folder_name
from lorakit.report import numbers
from lorakit.report.charts import Chart, Line, line_chart
from lorakit.report.page_templates import write_page
from lorakit.report.scatter import Spot, parallel, scatter

PAGE_NAME = "sweep.html"

_KINDS = {"winner": "second", "finished": "first", "stopped": "faint"}
_MOST_POINTED = 16  # lines of what is said where a curve is pointed at

TrainLosses = Mapping[str, Sequence[tuple[int, float]]]
"""Of each configuration, by its name: step and mean nats per supervised token."""


def write_sweep_page(folder: Path, table: dict[str, Any], losses: TrainLosses) -> None:
    """Writes the page of the sweep in `folder`; `table` is as in `leaderboard.json`."""
    rows, ranks = table["configurations"], table["ranks"]
    keys = list(table["sweep"]["over"])
    share = _common_share(rows)
    content = {
        "name": folder_name(folder),
        "verdict": f"{table['verdict']} With SVD: {ranks['line']}." if ranks else table["verdict"],
        "table": table,
        "rows": rows,
        "keys": keys,
        "key_figures": _key_figures(table),
        "curves": _curves(table, losses),
        "scatters": _scatters(rows, keys, share),
        "parallel": _parallel(rows, keys),
        "share": share,
        "span": _span(rows),
    }
    write_page(folder / PAGE_NAME, "sweep", content)


def _key_figures(table: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, value, and what else there is to say of it."""
    winner, steps, ranks = table["configurations"][0], table["steps"], table["ranks"]
    report, bare = winner["report"], table["base"]["report"]["mean"]
    gain = bare - winner["rungs"][-1]["report"]
    mean, low, high, base = (
        numbers.figures(value, 4) for value in (report["mean"], report["low"], report["high"], bare)
    )
    named = "Held-out loss" if table["objective"] == "loss" else table["objective"]
    trained = f"{steps['done']:,} of {steps['planned']:,} were trained"
    found = [
        ("Winner", winner["name"], f"of {len(table['configurations'])} configurations"),
        (named, mean, f"{low} to {high} in 95 % of draws"),
        ("Gain over the base", numbers.figures(gain), f"{table['loss_unit']}, from {base}"),
        ("Steps saved", numbers.share(steps["saved"], 1), trained),
    ]
    if ranks and (chosen := ranks["chosen"]):
        kept = numbers.share(chosen["kept"]["report"], 1)
        found.append(("Rank that does", f"{chosen['r']}", f"keeps {kept} of the gain"))
    return found


def _curves(table: dict[str, Any], losses: TrainLosses) -> list[Chart]:
    """Held-out and training losses of all over steps, the winner on top."""
    base = table["base"]["selection"]["mean"]
    held_out, training = [], []
    for kind, row in _upwards(table["configurations"]):
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
    there = [
        (kind, row, rung["selection"])
        for kind, row in _upwards(rows)
        for rung in row["rungs"]
        if rung["share"] == share
    ]
    return [
        scatter(key, [Spot(row["name"], row["changes"][key], loss, k) for k, row, loss in there])
        for key in keys
    ]


def _parallel(rows: list[dict[str, Any]], keys: list[str]) -> Any:
    """All settings beside the loss that each configuration came to."""
    lines = [
        (kind, [row["changes"][key] for key in keys], row["rungs"][-1]["selection"])
        for kind, row in _upwards(rows)
        if row["rungs"]
    ]
    return parallel(keys, lines, "loss")


def _upwards(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Each configuration with the class it is drawn with; the best comes last and on top."""
    kinds = [f"{_KINDS.get(row['status'], 'faint')} c{i}" for i, row in enumerate(rows)]
    return list(zip(kinds, rows, strict=True))[::-1]


def _span(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Between which values the intervals of the table lie."""
    found = [row["report"] for row in rows if row["report"]]
    low, high = min(x["low"] for x in found), max(x["high"] for x in found)
    return low, max(high, low + 1e-12)
