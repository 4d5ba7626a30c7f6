"""The rows of one batch to tensors: padded to one length, or in one line without padding."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data.masking import IGNORE, TokenizedRow

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads rows on the right to one length, a multiple of `pad_to_multiple_of` tokens."""

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, rows: list[TokenizedRow]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `attention_mask` and `labels`, each int64 of shape (batch, seq)."""
        import torch

        longest = max(len(row) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), length)
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE, dtype=torch.int64)
        for i, row in enumerate(rows):
            input_ids[i, : len(row)] = torch.tensor(row.input_ids)
            attention_mask[i, : len(row)] = 1
            labels[i, : len(row)] = torch.tensor(row.labels)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True, slots=True)
class LineCollator:
    """Puts rows into one line without padding; the names are those of flash attention."""

    def __call__(self, rows: list[TokenizedRow]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `position_ids` and `labels`, each int64 of shape (1, tokens).

        `cu_seq_lens_q` and `cu_seq_lens_k` (rows + 1,), int32, say where each row begins and the
        last one ends. The first label of a row is ignored: no row predicts the next.
        """
        import torch

        from lorakit.models.attention import in_a_line

        labels = [label for row in rows for label in (IGNORE, *row.labels[1:])]
        return {**in_a_line([row.input_ids for row in rows]), "labels": torch.tensor([labels])}
