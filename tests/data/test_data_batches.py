import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.batches import Collator
from lorakit.data.masking import IGNORE, TokenizedRow


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
