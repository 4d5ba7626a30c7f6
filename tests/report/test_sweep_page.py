"""A sweep's page in a real browser: wide and narrow, light and dark, and what pointing does."""

from pathlib import Path
from typing import Any

import pytest

from browsers import FAINT, LEAST_CONTRAST
from lorakit.report.scatter import Spot, axis_of, parallel, scatter
from lorakit.report.sweep_page import write_sweep_page

EVIL = "<script>alert(1)</script>"


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.07}


def table(count: int = 9) -> dict[str, Any]:
    """One with a winner, another that finished, stopped ones, and one that diverged."""
    rows = []
    for i in range(count):
        status = ["winner", "finished"][i] if i < 2 else "stopped"
        rungs = [{"share": 1 / 3, "step": 10, "selection": 1.5 + i / 10, "report": 1.5 + i / 10}]
        if i < 2:
            rungs.append({"share": 1, "step": 30, "selection": 1 + i / 10, "report": 1 + i / 10})
        row = {
            "name": f"r{2 ** (i % 3)}-lr{i}e-4",
            "status": status,
            "changes": {"lora.r": 2 ** (i % 3), "training.learning_rate": (i + 1) * 1e-4},
            "share": rungs[-1]["share"],
            "step": rungs[-1]["step"],
            "planned_steps": 30,
            "selection": interval(rungs[-1]["selection"]),
            "report": interval(rungs[-1]["report"]),
            "behind": interval(i / 10) if i else None,
            "no_difference": i == 1,
            "diverged": None,
            "rungs": rungs,
        }
        rows.append(row)
    rows[-1] |= {"status": "diverged", "diverged": EVIL, "rungs": [], "report": None}
    rows[-1] |= {"share": None, "selection": None, "behind": None, "changes": {
        "lora.r": 4, "training.learning_rate": 1e30}}  # fmt: skip
    kept = {"selection": 0.992, "report": 0.994}
    result = {"r": 3, "kept": kept, "report": 1.01, "difference": interval(0.01)}
    return {
        "model": "smollm2",
        "sweep": {"over": {"lora.r": [1, 2, 4], "training.learning_rate": [1e-4]}},
        "objective": "loss",
        "loss_unit": "nats a token",
        "verdict": f"{rows[0]['name']} wins {EVIL}.",
        "winner": rows[0]["name"],
        "rows": {"train": 100, "selection": 20, "report": 20},
        "base": {"selection": interval(3), "report": interval(3)},
        "steps": {"planned": 270, "done": 140, "saved": 0.48},
        "ranks": {"line": "r=4 trained, r=3 keeps 99.4%", "results": [result], "chosen": result},
        "notices": ["a" * 300, EVIL],
        "configurations": rows,
    }


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a-sweep-with-a-name-that-is-long")
    values = table()
    losses = {
        row["name"]: [(step, 3 - step / 20) for step in range(1, row["step"] + 1)]
        for row in values["configurations"]
    }
    write_sweep_page(folder, values, losses)
    return folder / "sweep.html"


@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["wide", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_screen_can_be_read_and_asks_for_nothing(
    browser: Any, page_path: Path, size: tuple[int, int], scheme: str
):
    view = {"width": size[0], "height": size[1]}
    context = browser.new_context(viewport=view, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda asking: asked.append(asking.url))
    page.goto(page_path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    found = page.evaluate(FAINT, LEAST_CONTRAST)
    assert found["seen"] > 50
    assert found["faint"] == []
    assert len(page.query_selector_all(".board tbody tr")) == 9
    assert len(page.query_selector_all(".parallel path.c0, .parallel path.c8")) == 1
    assert (said, asked) == ([], [page_path.as_uri()])
    context.close()


def test_pointing_at_a_row_brings_its_curves_out(browser: Any, page_path: Path):
    page = browser.new_page()
    page.goto(page_path.as_uri())
    width = "e => getComputedStyle(e).strokeWidth"
    curve = page.query_selector("#curves path.c3")
    before = curve.evaluate(width)
    page.hover(".board tr.r3")
    assert (before, curve.evaluate(width)) == ("1px", "4px")
    assert page.query_selector("#curves path.c4").evaluate(width) == "1px"
    page.close()


def test_a_few_values_have_places_and_many_numbers_a_scale():
    few = axis_of("r", [16, 4, 8, 4])
    assert [tick.label for tick in few.ticks] == ["4", "8", "16"]
    assert [few.place(value) for value in (4, 8, 16)] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    words = axis_of("init", ["pissa", True, ["a", "b"], "pissa"])
    assert [tick.label for tick in words.ticks] == ["pissa", "true", '["a", "b"]']
    rates = [10 ** (-5 + i / 4) for i in range(13)]
    many = axis_of("lr", rates)
    assert many.place(1e-4) - many.place(1e-5) == pytest.approx(many.place(1e-2) - many.place(1e-3))


def test_better_results_are_higher_up_and_worse_ones_lower():
    spots = [Spot("a", 4, 1.0, "first"), Spot("b", 8, 2.0, "first")]
    heights = [float(path.split()[1].partition("h")[0]) for _, path in scatter("r", spots).paths]
    assert heights[0] > heights[1]  # a loss of 1 lies below one of 2
    drawn = parallel(["r"], [("a", [4], 1.0), ("b", [8], 2.0)], "loss")
    ends = [float(path.rpartition(" ")[2]) for _, path in drawn.paths]
    assert ends[0] < ends[1]  # and in the other picture, better is up
