"""The page as a person sees it: in a real browser, wide and narrow, light and dark."""

import base64
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from folders import save_run, save_samples

from browsers import FAINT, LEAST_CONTRAST
from lorakit.report.run_page import write_report

WIDE, PHONE = (1280, 900), (390, 844)
LOOKS = [(size, scheme) for size in (WIDE, PHONE) for scheme in ("light", "dark")]
# The colours of a PNG: at points, and how many pixels have each.
_COLORS = """async ([png, points]) => {
  const image = new Image();
  image.src = "data:image/png;base64," + png;
  await image.decode();
  const canvas = new OffscreenCanvas(image.width, image.height);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  const {data} = context.getImageData(0, 0, image.width, image.height);
  const at = i => data.slice(i, i + 3).join(",");
  const counts = {};
  for (let i = 0; i < data.length; i += 4) counts[at(i)] = (counts[at(i)] ?? 0) + 1;
  const place = ([x, y]) => 4 * (Math.round(y) * image.width + Math.round(x));
  return {at: points.map(point => at(place(point))), counts};
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with warnings, long words and text that would be markup."""
    folder = save_run(
        tmp_path_factory.mktemp("runs") / "orders-of-a-shop-with-a-name-that-is-long",
        layers=6,
        steps=120,
        warnings=[{"step": 40, "warning": "w", "message": "the loss rises", "cure": "w" * 300}],
    )
    save_samples(folder, [("<script>alert(1)</script>", "r" * 400, "{" * 300, "好的，" * 100)] * 3)
    return write_report(folder).path


@pytest.fixture(scope="module", params=LOOKS, ids=lambda look: f"{look[0][0]}-{look[1]}")
def shown(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in one size and scheme; at the end it has said nothing and asked for nothing."""
    (width, height), scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda asking: asked.append(asking.url))
    page.goto(report.as_uri())
    yield page
    assert said == []
    assert asked == [report.as_uri()]
    context.close()


def boxes(page: Any, selector: str) -> list[dict[str, float]]:
    found = [element.bounding_box() for element in page.query_selector_all(selector)]
    assert found
    assert all(found), f"{selector} is not to be seen"
    return found


def test_everything_fits_the_screen_and_can_be_read(shown: Any, tmp_path: Path):
    shown.screenshot(path=tmp_path / "page.png", full_page=True)
    width = shown.viewport_size["width"]
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    for box in boxes(shown, "section, figure, .answer, .heat, h1, .verdict, .figures div, pre"):
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    cells = "[...document.querySelectorAll('.heat td')]"
    assert (
        shown.evaluate(f"{cells}.filter(cell => cell.scrollWidth > cell.clientWidth).length") == 0
    )
    shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    found = shown.evaluate(FAINT, LEAST_CONTRAST)
    assert found["seen"] > 200
    assert found["faint"] == []


def test_every_chart_is_drawn_with_labels_that_do_not_overlap(
    shown: Any, browser: Any, tmp_path: Path
):
    plots = boxes(shown, ".plot svg")
    assert len(plots) == 7
    assert all(box["width"] > 200 and box["height"] > 100 for box in plots)
    assert all(box["height"] > 1 for box in boxes(shown, ".plot rect"))
    for plot in shown.query_selector_all(".plot"):
        ticks = [tick.bounding_box() for tick in plot.query_selector_all(".tick.x")]
        assert len(ticks) > 1
        for one, next_one in pairwise(ticks):
            assert one["x"] + one["width"] < next_one["x"]
        assert all(tick.bounding_box()["x"] >= 0 for tick in plot.query_selector_all(".tick.y"))
    colors = counted(browser, shown.query_selector(".plot").screenshot())["counts"]
    for series in ("first", "second"):
        stroke = shown.evaluate(
            f"getComputedStyle(document.querySelector('.plot .{series}')).stroke"
        )
        assert colors.get(stroke.removeprefix("rgb(").removesuffix(")").replace(" ", ""), 0) > 50


def test_the_cells_of_the_heat_maps_differ_in_colour(shown: Any, browser: Any):
    for name in ("#map-change", "#map-rank"):
        table = shown.query_selector(f"{name} .heat")
        place = table.bounding_box()
        cells = table.query_selector_all("td[title]")
        assert len(cells) == 6 * 7
        corners = [  # above the text
            (box["x"] - place["x"] + box["width"] / 2, box["y"] - place["y"] + 3)
            for cell in cells
            if (box := cell.bounding_box())
        ]
        levels = [cell.get_attribute("class") for cell in cells]
        colors = counted(browser, table.screenshot(), corners)["at"]
        pairs = set(zip(levels, colors, strict=True))
        assert len({color for _, color in pairs}) == len(set(levels)) == len(pairs) >= 3


def test_a_curve_tells_its_values_where_it_is_pointed_at(shown: Any):
    tip = shown.query_selector(".hit:nth-of-type(20) > span")
    assert not tip.is_visible()
    tip.evaluate_handle("tip => tip.parentElement").as_element().hover()
    assert tip.is_visible()
    assert "step " in tip.inner_text()
    assert "training, mean of" in tip.inner_text()


def test_text_of_the_run_is_shown_as_it_is(shown: Any):
    assert shown.query_selector(".sample .text").inner_text() == "<script>alert(1)</script>"
    assert shown.evaluate("document.scripts.length") == 0


def counted(browser: Any, png: bytes, points: Any = ()) -> Any:
    """The colours of a picture at `points`, and the number of pixels of each colour."""
    page = browser.new_page()
    found = page.evaluate(_COLORS, [base64.b64encode(png).decode(), list(points)])
    page.close()
    return found
