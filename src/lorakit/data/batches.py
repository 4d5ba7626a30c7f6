"""The rows of one batch to tensors: padded to one length, or in one line without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data.label_rows import LabelledRow
from lorakit.data.masking import IGNORE, TokenizedRow

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads rows on the right to one length, a multiple of `pad_to_multiple_of` tokens."""

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, rows: Sequence[TokenizedRow]) -> "dict[str, torch.Tensor]":
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
class LabelCollator:
    """Pads inputs and labels on the right, each to a length of its own.

    Args:
        one_label: rows have a class each, and not a label a token.
    """

    pad_token_id: int
    one_label: bool = False
    pad_to_multiple_of: int = 8

    def __call__(self, rows: Sequence[TokenizedRow]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `attention_mask`, `labels` and, if rows have segments, `token_type_ids`.

        Each is int64 of shape (batch, seq); `labels` (batch, 1) for a class a row.
        """
        ids = [row.input_ids for row in rows]
        batch = {
            "input_ids": self._padded(ids, self.pad_token_id),
            "attention_mask": self._padded([[1] * len(row) for row in ids], 0),
        }
        segments = [row.segments for row in rows if isinstance(row, LabelledRow) and row.segments]
        if segments:
            batch["token_type_ids"] = self._padded(segments, 0)
        multiple = 1 if self.one_label else self.pad_to_multiple_of
        batch["labels"] = self._padded([row.labels for row in rows], IGNORE, multiple)
        return batch

    def _padded(
        self, rows: Sequence[Sequence[int]], value: int, multiple: int | None = None
    ) -> "torch.Tensor":
        import torch

        multiple = multiple or self.pad_to_multiple_of
        length = -(-max(map(len, rows)) // multiple) * multiple
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


@dataclass(frozen=True, slots=True)
class LineCollator:
    """Puts rows into one line without padding; the names are those of flash attention."""

    def __call__(self, rows: Sequence[TokenizedRow]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `position_ids` and `labels`, each int64 of shape (1, tokens).

        `cu_seq_lens_q` and `cu_seq_lens_k` (rows + 1,), int32, say where each row begins and the
        last one ends. The first label of a row is ignored: no row predicts the next.
        """
        import torch

        from lorakit.models.attention import in_a_line

        labels = [label for row in rows for label in (IGNORE, *row.labels[1:])]
        return {**in_a_line([row.input_ids for row in rows]), "labels": torch.tensor([labels])}
