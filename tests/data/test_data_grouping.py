"""Plans of batches: every row once, the same number in each epoch, within the budget."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.grouping import (
    GRAIN,
    LIKE_LENGTHS,
    Batches,
    by_like_lengths,
    by_padded_tokens,
    by_rows,
    by_tokens,
    evened,
)

LENGTHS = st.lists(st.integers(1, 500), max_size=300)
Plan = Callable[[list[int], int, int, int], Batches]

PLANS: dict[str, Plan] = {
    "by_rows": lambda lengths, size, seed, epoch: by_rows(len(lengths), size, seed, epoch),
    "by_like_lengths": by_like_lengths,
    "three_batches_a_step": lambda *a: by_like_lengths(*a, together=3),
    "by_tokens": lambda lengths, size, *a: by_tokens(lengths, 100 * size, *a),
    "by_padded_tokens": lambda lengths, size, *a: by_padded_tokens(lengths, 100 * size, *a),
    "evened": lambda *a: evened(by_like_lengths(*a), 4),
}


@pytest.mark.parametrize("name", PLANS)
@given(lengths=LENGTHS, size=st.integers(1, 20), seed=st.integers(), epoch=st.integers(0, 5))
def test_a_plan_has_every_row_once_and_every_epoch_as_many_batches(
    name: str, lengths: list[int], size: int, seed: int, epoch: int
):
    plan = PLANS[name]
    batches = plan(lengths, size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)
    assert batches == plan(lengths, size, seed, epoch)
    assert len(batches) == len(plan(lengths, size, seed, epoch + 1))


@pytest.mark.parametrize("name", PLANS)
def test_every_epoch_and_every_seed_has_another_plan(name: str):
    lengths = list(range(1, 101))
    plans = [PLANS[name](lengths, 4, s, e) for s, e in [(1, 0), (1, 1), (2, 0), (11, 0)]]
    assert all(plans.count(plan) == 1 for plan in plans)


@given(LENGTHS, st.integers(40, 2000))
def test_a_batch_of_several_rows_stays_within_its_tokens(lengths: list[int], budget: int):
    for batch in by_tokens(lengths, budget, 0, 0):
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= budget
    for batch in by_padded_tokens(lengths, budget, 0, 0):
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


@given(LENGTHS, st.integers(500, 2000))
def test_best_fit_leaves_no_two_batches_that_would_go_into_one(lengths: list[int], budget: int):
    filled = [
        sum(-(-lengths[i] // GRAIN) for i in batch) for batch in by_tokens(lengths, budget, 0, 0)
    ]
    two_emptiest = sorted(filled)[:2]
    assert len(filled) < 2 or sum(two_emptiest) > budget // GRAIN


def test_best_fit_fills_batches_almost_wholly():
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(4.5, 0.7)) + 4 for _ in range(2000)]
    batches = by_tokens(lengths, 2048, 0, 0)
    assert sum(lengths) / (2048 * len(batches)) > 0.94


def test_grouping_saves_most_of_the_padding():
    rng = random.Random(0)
    lengths = [rng.randint(10, 500) for _ in range(4 * LIKE_LENGTHS + 3)]

    def padded(batches: Batches) -> int:
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)

    wasted = padded(by_like_lengths(lengths, 4, 0, 0)) - sum(lengths)
    assert wasted < 0.1 * (padded(by_rows(len(lengths), 4, 0, 0)) - sum(lengths))
    wasted = padded(by_padded_tokens(lengths, 2000, 0, 0)) - sum(lengths)
    assert wasted < 0.1 * (padded(by_rows(len(lengths), 4, 0, 0)) - sum(lengths))


@pytest.mark.parametrize("name", ["by_like_lengths", "by_tokens", "by_padded_tokens"])
def test_batches_are_not_in_order_of_length(name: str):
    lengths = list(range(1, 201))
    firsts = [lengths[batch[0]] for batch in PLANS[name](lengths, 4, 0, 0)]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 8))
def test_processes_get_as_many_batches_each_where_there_are_rows_enough(
    rows: int, size: int, processes: int
):
    batches = evened(by_rows(rows, size, 0, 0), processes)
    assert len(batches) % processes == 0 or len(batches) == rows
