import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.batches import GROUP, Collator, length_grouped_order
from lorakit.data.masking import IGNORE, TokenizedRow

LENGTHS = st.lists(st.integers(1, 500), max_size=400)


def row_of(length: int) -> TokenizedRow:
    ids = list(range(1, length + 1))
    return TokenizedRow(ids, [IGNORE, *ids[1:]], "rows.jsonl:1")


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 16))
def test_rows_are_padded_on_the_right_and_pads_are_never_learned(
    lengths: list[int], multiple: int
) -> None:
    rows = [row_of(length) for length in lengths]
    batch = Collator(pad_token_id=7, pad_to_multiple_of=multiple)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0
    assert max(lengths) <= width < max(lengths) + multiple
    for i, row in enumerate(rows):
        pads = width - len(row)
        assert batch["input_ids"][i].tolist() == row.input_ids + [7] * pads
        assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * pads
        assert batch["labels"][i].tolist() == row.labels + [IGNORE] * pads
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@given(LENGTHS, st.integers(1, 20), st.integers(), st.integers(0, 5))
def test_the_order_has_every_row_once_and_is_reproducible(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    order = length_grouped_order(lengths, batch_size, seed, epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert order == length_grouped_order(lengths, batch_size, seed, epoch)


def test_every_epoch_and_every_seed_has_another_order() -> None:
    lengths = list(range(1, 101))
    orders = [length_grouped_order(lengths, 4, s, e) for s, e in [(1, 0), (1, 1), (2, 0), (11, 0)]]
    assert len(set(map(tuple, orders))) == 4


def test_grouping_saves_most_of_the_padding() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(10, 500) for _ in range(4 * GROUP + 3)]

    def padded(order: list[int]) -> int:
        batches = [order[i : i + 4] for i in range(0, len(order), 4)]
        return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)

    wasted = padded(length_grouped_order(lengths, 4, 0, 0)) - sum(lengths)
    wasted_at_random = padded(list(range(len(lengths)))) - sum(lengths)
    assert wasted < 0.1 * wasted_at_random


def test_batches_are_not_in_order_of_length() -> None:
    order = length_grouped_order(list(range(200)), 4, 0, 0)
    firsts = order[::4]
    assert firsts != sorted(firsts)
    assert firsts != sorted(firsts, reverse=True)
