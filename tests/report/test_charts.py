"""Curves keep what matters when thinned, and axes end at round numbers."""

import math
import random

import pytest

from lorakit.report.charts import Chart, Line, histogram, line_chart, smoothed, thinned


def drawn(chart: Chart | None) -> Chart:
    assert chart is not None
    return chart


def chart_of(values: list[float], **options: bool) -> Chart:
    points = [(float(step), value) for step, value in enumerate(values, 1)]
    return drawn(line_chart("Loss", [Line("loss", "line first", points)], **options))


def test_thinning_keeps_the_ends_and_every_spike():
    numbers = random.Random(0)
    points = [(float(i), numbers.random()) for i in range(25_000)]
    points[12_345], points[777] = (12_345.0, 50.0), (777.0, -50.0)
    kept = thinned(points, 1000)
    assert len(kept) <= 1000
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert {points[12_345], points[777]} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(points[:1000], 1000) == points[:1000]


def test_a_thinned_curve_says_so():
    chart = chart_of([math.sin(i / 50) for i in range(3000)])
    assert len(chart.notes) == 1
    assert "of 3000 points are drawn" in chart.notes[0]
    assert chart.paths[0][1].count("L") < 1000
    assert chart_of([1.0, 2.0]).notes == []


@pytest.mark.parametrize(
    "values",
    [
        [2.5],
        [0.0, 0.0],
        [3.0, 3.0],
        [-1e-9, 1e-9],
        [1e-12, 1e12],
        [2.71, 0.4],
        [1e300, 1e299],
        [0.0, 1e-300],
    ],
)
@pytest.mark.parametrize("from_zero", [True, False])
def test_every_curve_has_a_drawing_inside_the_plot_and_readable_ticks(
    values: list[float], from_zero: bool
):
    chart = chart_of(values, from_zero=from_zero)
    numbers = [
        float(n)
        for _, path in chart.paths
        for pair in path.replace("h0", "").strip("M").replace("M", "L").split("L")
        for n in pair.split()
    ]
    assert all(-0.05 <= n <= 1000.05 for n in numbers[0::2])
    assert all(-0.05 <= n <= 400.05 for n in numbers[1::2])
    assert 2 <= len(chart.y_ticks) <= 8
    assert all(-0.01 <= tick.at <= 100.01 for tick in [*chart.y_ticks, *chart.x_ticks])
    labels = [tick.label for tick in chart.y_ticks]
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels)) < 10 or max(values) > 1e99


def test_a_wide_range_of_positive_values_gets_a_log_scale_and_says_so():
    assert chart_of([100.0, 10.0, 1.0]).notes == ["log scale"]
    assert chart_of([100.0, 10.0, 1.0], from_zero=True).notes == []
    assert chart_of([3.0, 1.0]).notes == []
    middle = chart_of([1000.0, 31.6, 1.0]).paths[0][1].split("L")[1].split()[1]
    assert float(middle) == pytest.approx(200, abs=15)


def test_every_logged_value_can_be_pointed_at_until_there_are_too_many():
    hits = chart_of([3.0, 2.0, 1.0]).hits
    assert [hit.lines for hit in hits] == [
        ["step 1", "loss 3.00"],
        ["step 2", "loss 2.00"],
        ["step 3", "loss 1.00"],
    ]
    assert sum(hit.width for hit in hits) == pytest.approx(100)
    assert len(chart_of([1.0] * 5000).hits) <= 60


def test_no_points_are_no_chart():
    assert line_chart("Loss", [Line("loss", "line first", [])]) is None
    assert histogram("Lengths", [], 256) is None


def test_a_histogram_marks_where_rows_are_cut():
    chart = drawn(histogram("Lengths", [(0, 64, 10), (64, 128, 40), (128, 256, 20)], 256))
    assert [round(height) for *_, height in chart.bars] == [100, 400, 200]
    assert chart.mark is not None
    assert (chart.mark.at, chart.mark.label) == (100, "cut at 256")
    assert chart.hits[2].lines == ["128 to 255 tokens", "20 rows"]

    far = drawn(histogram("Lengths", [(0, 64, 10)], 4096))
    assert far.mark is None
    assert far.notes == ["rows would be cut at 4,096 tokens, far to the right of this"]
    assert drawn(histogram("Lengths", [(0, 64, 10)], None)).mark is None


def test_smoothing_is_the_mean_of_the_neighbours():
    points = [(float(i), float(i % 2)) for i in range(9)]
    assert smoothed(points, 1) == points
    assert smoothed([(0, 3.0), (1, 6.0), (2, 9.0)], 3) == [(0, 4.5), (1, 6.0), (2, 7.5)]
