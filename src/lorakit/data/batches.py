"""The rows of one batch to tensors: padded to one length, or in one line without padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data.label_rows import LabelledRow
from lorakit.data.line_pictures import joined_pictures, line_pictures
from lorakit.data.masking import IGNORE, TokenizedRow, sequences_of
from lorakit.data.picture_rows import tensors_of
from lorakit.data.prefixes import Segment, in_segments

if TYPE_CHECKING:
    import torch


def under(prefix: str, batch: Mapping[str, "torch.Tensor"]) -> "dict[str, torch.Tensor]":
    """The tensors of a batch that stands beside another one, under names that begin alike."""
    return {prefix + name: tensor for name, tensor in batch.items()}


def taken_from(batch: Mapping[str, "torch.Tensor"], prefix: str) -> "dict[str, torch.Tensor]":
    """The batch that `under` has put beside another one."""
    start = len(prefix)
    return {k[start:]: tensor for k, tensor in batch.items() if k.startswith(prefix)}


def in_parts(
    batches: "Sequence[Mapping[str, torch.Tensor]]",
) -> "dict[str, torch.Tensor]":
    """A batch that is learned in several passes, one after the other (`parts_of`)."""
    first, *others = batches
    found = dict(first)
    for i, other in enumerate(others, 1):
        found |= under(f"part{i}.", other)
    return found


def parts_of(batch: "Mapping[str, torch.Tensor]") -> "list[dict[str, torch.Tensor]]":
    """The batches that `in_parts` has put together; the batch itself where there are none."""
    others: list[dict[str, torch.Tensor]] = []
    while other := taken_from(batch, f"part{len(others) + 1}."):
        others.append(other)
    prefixes = tuple(f"part{i}." for i in range(1, len(others) + 1))
    own = {k: tensor for k, tensor in batch.items() if not prefixes or not k.startswith(prefixes)}
    return [own, *others]


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads rows on the right to one length, a multiple of `pad_to_multiple_of` tokens."""

    pad_token_id: int
    pad_to_multiple_of: int = 8

    def __call__(self, rows: Sequence[TokenizedRow]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `attention_mask` and `labels`, each int64 of shape (batch, seq).

        Beside them what the model is given of the rows' pictures, if there are any.
        """
        rows, multiple = sequences_of(rows), self.pad_to_multiple_of
        pictures, kinds = tensors_of(rows)
        return {
            "input_ids": _padded([row.input_ids for row in rows], self.pad_token_id, multiple),
            "attention_mask": _padded([[1] * len(row) for row in rows], 0, multiple),
            "labels": _padded([row.labels for row in rows], IGNORE, multiple),
            **{name: _padded(own, 0, multiple) for name, own in kinds.items()},
            **pictures,
        }


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
        ids, multiple = [row.input_ids for row in rows], self.pad_to_multiple_of
        batch = {
            "input_ids": _padded(ids, self.pad_token_id, multiple),
            "attention_mask": _padded([[1] * len(row) for row in ids], 0, multiple),
        }
        segments = [row.segments for row in rows if isinstance(row, LabelledRow) and row.segments]
        if segments:
            batch["token_type_ids"] = _padded(segments, 0, multiple)
        labels = [row.labels for row in rows]
        batch["labels"] = _padded(labels, IGNORE, 1 if self.one_label else multiple)
        return batch


def _padded(rows: Sequence[Sequence[int]], value: int, multiple: int) -> "torch.Tensor":
    """`rows` (batch, length), int64, filled with `value` to a multiple of the length."""
    import torch

    length = -(-max(map(len, rows)) // multiple) * multiple
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


@dataclass(frozen=True, slots=True)
class LineCollator:
    """Puts rows into one line without padding; the names are those of flash attention.

    Args:
        share_prefixes: rows that begin alike are a tree, of which each prefix stands in the line
            once, for a model that takes that (`models.lines.take_prefixes`).
    """

    share_prefixes: bool = False

    def __call__(self, rows: Sequence[TokenizedRow]) -> "dict[str, torch.Tensor]":
        """`input_ids`, `position_ids` and `labels`, each int64 of shape (1, tokens).

        With pictures, a model whose positions have three dimensions is given `position_ids`
        (4, 1, tokens), the first of them as without pictures.

        `cu_seq_lens_q` and `cu_seq_lens_k` (segments + 1,), int32, say where each segment begins
        and the last one ends: a row, or a part of one behind a shared prefix. Where there are
        prefixes, `parents` (segments,), int32, says behind which segment each goes on, -1 for
        none. The first label of a segment is ignored: none predicts the next. Beside them is what
        the model is given of the rows' pictures, if there are any.
        """
        import torch

        from lorakit.models.lines import in_a_line

        rows = sequences_of(rows)
        if self.share_prefixes:
            segments = in_segments(rows)
        else:
            segments = [Segment(i, 0, len(row), None) for i, row in enumerate(rows)]
        ids = [rows[i].input_ids[begin:end] for i, begin, end, _ in segments]
        labels = [x for i, begin, end, _ in segments for x in _learned(rows[i], begin, end)]
        shared = any(segment.parent is not None for segment in segments)
        parents = [segment.parent for segment in segments] if shared else None
        line = {**in_a_line(ids, parents), "labels": torch.tensor([labels])}
        return line | line_pictures(rows, segments)


def _learned(row: TokenizedRow, begin: int, end: int) -> list[int]:
    return [IGNORE, *row.labels[begin + 1 : end]]


def joined_lines(batches: "Sequence[Mapping[str, torch.Tensor]]") -> "dict[str, torch.Tensor]":
    """Lines, as `LineCollator` makes them, one behind the other in one line."""
    import torch

    begins, tokens = [batches[0]["cu_seq_lens_q"][:1]], 0
    parents, segments = [], 0
    for batch in batches:
        ends = batch["cu_seq_lens_q"][1:]
        own = batch.get("parents")
        if own is None:
            own = torch.full_like(ends, -1)
        begins.append(ends + tokens)
        parents.append(torch.where(own < 0, own, own + segments))
        tokens += batch["input_ids"].shape[1]
        segments += len(ends)
    line = {name: torch.cat([b[name] for b in batches], dim=1) for name in ("input_ids", "labels")}
    positions = [batch["position_ids"] for batch in batches]
    if any(x.ndim == 3 for x in positions):  # rows with pictures among others
        positions = [x.expand(4, *x.shape[-2:]) for x in positions]
    line["position_ids"] = torch.cat(positions, dim=-1)
    line |= joined_pictures(batches, line)
    line["cu_seq_lens_q"] = line["cu_seq_lens_k"] = torch.cat(begins)
    if any("parents" in batch for batch in batches):
        line["parents"] = torch.cat(parents)
    return line


def count_tokens(batch: "Mapping[str, torch.Tensor]") -> "int | torch.Tensor":
    """The tokens of a batch's rows: without padding, and with prefixes as often as rows have them.

    Args:
        batch: as one of these collators makes it.
    """
    if "attention_mask" in batch and "cu_seq_lens_q" not in batch:
        return batch["attention_mask"].sum()
    if "parents" not in batch:
        return batch["input_ids"].numel()
    import torch

    begins, parents = batch["cu_seq_lens_q"], batch["parents"]
    ends_a_row = torch.ones_like(parents, dtype=torch.bool)
    ends_a_row[parents[parents >= 0].long()] = False
    last = (begins[1:] - 1).long()[ends_a_row]
    positions = batch["position_ids"]
    numbers = positions[0] if positions.ndim == 3 else positions
    return (numbers[0, last] + 1).sum()
