"""A tree of shared prefixes holds every row, and saves what it can."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.batches import LineCollator, count_tokens
from lorakit.data.grouping import by_beginning
from lorakit.data.masking import IGNORE, TokenizedRow
from lorakit.data.prefixes import WORTH, Segment, in_segments


def row_of(prompt: list[int], answer: list[int]) -> TokenizedRow:
    return TokenizedRow(prompt + answer, [IGNORE] * len(prompt) + answer, "here")


# Few tokens in blocks, so that rows have much in common at every depth.
BLOCKS = st.lists(st.sampled_from([[1] * 9, [2] * 17, [3], [1, 2] * 4]), max_size=4)
ROWS = st.lists(
    st.builds(
        row_of,
        BLOCKS.map(lambda blocks: [0, *(token for block in blocks for token in block)]),
        st.lists(st.integers(4, 6), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=9,
)


def path_of(segments: list[Segment], last: int) -> list[Segment]:
    found: list[Segment] = []
    at: int | None = last
    while at is not None:
        found.insert(0, segments[at])
        at = segments[at].parent
    return found


@given(ROWS)
def test_every_row_is_there_with_all_that_is_learned_in_a_part_of_its_own(
    rows: list[TokenizedRow],
):
    segments = in_segments(rows)
    parents = {segment.parent for segment in segments}
    leaves = [i for i in range(len(segments)) if i not in parents]
    assert [segments[i].row for i in leaves] == list(range(len(rows)))  # in their order
    for row, leaf in zip(rows, leaves, strict=True):
        path = path_of(segments, leaf)
        assert [p.begin for p in path] == [0, *(p.end for p in path[:-1])]
        ids = [token for p in path for token in rows[p.row].input_ids[p.begin : p.end]]
        assert ids == row.input_ids
        # The token whose output predicts the first learned one is the row's own.
        first = next(t for t, label in enumerate(row.labels) if label != IGNORE)
        assert path[-1].begin < first or first == 0
    assert all(p.parent is None or p.parent < i for i, p in enumerate(segments))


@given(ROWS)
def test_the_tensors_count_each_rows_tokens_and_learn_each_label_once(rows: list[TokenizedRow]):
    plain, tree = LineCollator()(rows), LineCollator(share_prefixes=True)(rows)
    total = sum(map(len, rows))
    assert int(count_tokens(tree)) == int(count_tokens(plain)) == total
    saved = total - tree["input_ids"].numel()
    assert (saved > 0) == ("parents" in tree)
    assert saved == 0 or saved >= WORTH
    learned = [label for row in rows for label in row.labels[1:] if label != IGNORE]
    for batch in (plain, tree):
        labels = batch["labels"][0]
        assert labels[labels != IGNORE].tolist() == learned
        starts = batch["cu_seq_lens_q"][:-1].long()
        assert (labels[starts] == IGNORE).all()


def test_prefixes_are_shared_at_every_depth():
    system, one, other = list(range(1, 21)), list(range(30, 50)), list(range(60, 80))
    rows = [
        row_of([*system, *one], [7]),
        row_of([*system, *other], [8]),
        row_of([*system, *one], [9, 9]),
    ]
    segments = in_segments(rows)
    # The last token of a prompt predicts the answer, and is no prefix.
    assert segments == [
        Segment(0, 0, 20, None),
        Segment(0, 20, 39, 0),
        Segment(0, 39, 41, 1),
        Segment(1, 20, 41, 0),
        Segment(2, 39, 42, 1),
    ]
    batch = LineCollator(share_prefixes=True)(rows)
    assert batch["parents"].tolist() == [-1, 0, 1, 0, 1]
    assert batch["position_ids"][0].tolist() == [
        position for s in segments for position in range(s.begin, s.end)
    ]


def test_what_is_learned_is_never_shared():
    text = TokenizedRow(list(range(50)), [IGNORE, *range(1, 50)], "here")
    assert "parents" not in LineCollator(share_prefixes=True)([text, text])


def test_rows_that_begin_alike_share_batches_and_the_largest_come_first():
    rows = [[1, 2], [3, 4, 5, 6], [1, 2, 3], [3, 4]]
    assert by_beginning(rows, 2) == [[3, 1], [0, 2]]


def test_a_long_chain_of_prefixes_needs_no_deep_recursion():
    rows = [row_of([1] * (20 * i) + [2, 3], [4]) for i in range(1, 300)]
    batch = LineCollator(share_prefixes=True)(rows)
    assert batch["input_ids"].numel() < 20 * 300 + 3 * 300
    assert torch.equal(count_tokens(batch), torch.tensor(sum(map(len, rows))))
