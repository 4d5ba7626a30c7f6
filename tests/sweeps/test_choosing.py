"""Who goes on, who wins, and what cannot be told apart."""

import random

import pytest

from lorakit.bootstrap import (
    loss_interval,
    mean_loss,
    score_interval,
)
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.sweeps.search import promoted, rungs
from lorakit.sweeps.splits import REPORT, SELECTION, split


def test_rungs_leave_one_or_a_few_at_the_end():
    assert rungs(12, 3) == pytest.approx([1 / 9, 1 / 3, 1])
    assert rungs(27, 3) == pytest.approx([1 / 27, 1 / 9, 1 / 3, 1])
    assert rungs(2, 3) == [1]
    assert rungs(8, 2) == [1 / 8, 1 / 4, 1 / 2, 1]


def test_the_best_share_goes_on_in_the_order_in_which_it_was_drawn():
    losses = {"a": 3.0, "b": 1.0, "c": 2.0, "d": 2.5, "e": 4.0}
    assert promoted(losses, list("abcde"), 3) == ["b", "c"]
    # A later round is measured by all that reached the rung before it.
    assert promoted(losses | {"f": 1.5}, ["f"], 3) == ["f"]
    assert promoted(losses | {"f": 2.2}, ["f"], 3) == []
    assert promoted({"a": 2.0, "b": 1.0, "c": 3.0, "d": 4.0}, list("abcd"), 3) == ["b"]
    assert promoted({"a": 2.0}, ["a"], 3) == ["a"]


def rows_of(count, level, seed):
    draw = random.Random(seed)
    return [(tokens * draw.gauss(level, 0.5), tokens) for tokens in [5, 10, 20] * (count // 3)]


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(200):
        rows = rows_of(90, 2.0, seed)
        interval = loss_interval(rows, range(90), seed)
        assert interval.mean == pytest.approx(mean_loss(rows))
        held += interval.low <= 2.0 <= interval.high
    assert 178 <= held <= 199


def test_a_difference_is_found_where_single_means_could_not_tell():
    easy = rows_of(60, 2.0, 1)
    harder = [(nats + 0.05 * tokens, tokens) for nats, tokens in easy]
    units = range(60)
    one, other = loss_interval(easy, units, 0), loss_interval(harder, units, 0)
    assert one.high > other.low
    difference = loss_interval(harder, units, 0, minus=easy)
    assert difference.mean == pytest.approx(0.05)
    assert not difference.holds_zero
    none = 0
    for seed in range(100):
        draw = random.Random(seed)
        noisy = [(nats + tokens * draw.gauss(0, 0.3), tokens) for nats, tokens in easy]
        none += loss_interval(noisy, units, seed, minus=easy).holds_zero
    assert 88 <= none <= 99


def test_rows_of_one_prompt_count_as_one():
    rows = rows_of(60, 2.0, 5)
    repeated = [row for row in rows for _ in range(4)]
    units = [i for i in range(60) for _ in range(4)]
    one = loss_interval(rows, range(60), 0)
    assert loss_interval(repeated, units, 0).half == pytest.approx(one.half)
    assert loss_interval(repeated, range(240), 0).half < 0.6 * one.half


def test_scores_have_intervals_too():
    right = [1, 0, 1, 1] * 10
    interval = score_interval(lambda which: sum(right[i] for i in which) / len(which), 40, 0)
    assert interval.mean == 0.75
    assert 0.55 < interval.low < 0.7 < 0.8 < interval.high < 0.95


def samples(prompts, each):
    return [
        Sample(
            (
                {"role": "user", "content": f"p{i}"},
                {"role": "assistant", "content": f"a{n}"},
            ),
            None,
            f"row {i}",
        )
        for i in range(prompts)
        for n in range(each)
    ]


def test_rows_of_one_prompt_stay_on_one_side():
    found = samples(40, 3)
    parts = split(list(range(120)), found, 0.25, seed=0)
    assert [len(parts[name].rows) for name in (SELECTION, REPORT)] == [30, 90]
    keys = [{s.prompt_key for s in parts[name].samples} for name in (SELECTION, REPORT)]
    assert not keys[0] & keys[1]
    assert parts[SELECTION].units == [i for i in range(10) for _ in range(3)]
    other = split(list(range(120)), found, 0.25, seed=1)
    assert other[SELECTION].rows != parts[SELECTION].rows


def test_too_few_prompts_are_refused():
    with pytest.raises(InputError, match="30 rows with 10 prompts are too few"):
        split(list(range(30)), samples(10, 3), 0.5, seed=0)
