"""What a model is given of the pictures of rows that lie in one line (`batches.LineCollator`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from lorakit.data.picture_rows import tensors_of

if TYPE_CHECKING:
    import torch

    from lorakit.data.prefixes import Segment

_OF_LINES = ("cu_seq_lens_q", "cu_seq_lens_k", "parents")


def line_pictures(rows: Sequence[Any], segments: Sequence[Segment]) -> dict[str, torch.Tensor]:
    """Tensors of the pictures in the order of the line, and which of its tokens are of pictures.

    With them `position_ids` (4, 1, tokens) where a model's positions have three dimensions: the
    first of four is the token's number in its row. Where tokens of pictures may see later ones,
    `attention_mask` (1, tokens) has only ones: without it, transformers takes the positions in the
    rows for those in the line, at which it looks up pictures. Empty where no row has a picture.

    Args:
        rows: `TokenizedRow`s.
        segments: of the line. The pictures of a row lie in one of them (`prefixes.in_segments`).
    """
    import torch

    parts = [_part(rows[i], begin, end) for i, begin, end, _ in segments]
    tensors, kinds = tensors_of(parts)
    having = [part.pictures for part in parts if part.pictures is not None]
    if not tensors or not having:
        return {}
    given = {name: torch.tensor([[x for one in own for x in one]]) for name, own in kinds.items()}
    reader = having[0].reader
    positions = reader.positions
    if positions is None or (grids := tensors.get(positions.grids)) is None:
        if given:
            given["attention_mask"] = torch.ones_like(next(iter(given.values())))
        return given | tensors
    counts = [len(part.pictures.placed) if part.pictures else 0 for part in parts]
    ends = accumulate(counts)
    behind: list[torch.Tensor] = []  # of each segment, the pictures in it or in its prefixes
    found: list[torch.Tensor] = []
    for (i, begin, end, parent), number, last in zip(segments, counts, ends, strict=True):
        own = grids[last - number : last]
        behind.append(own if number or parent is None else behind[parent])
        ids = rows[i].input_ids[:end]
        [kind] = reader.kinds(ids).values()
        found.append(positions.of_row(ids, kind, behind[-1])[0][:, begin:])
    given["position_ids"] = torch.cat(found, dim=1)[:, None]
    return given | tensors


def _part(row: Any, begin: int, end: int) -> Any:
    """The tokens [begin, end) of a row, with its pictures if they lie there."""
    pictures = row.pictures
    if pictures is not None:
        there = tuple(one for one in pictures.placed if begin <= one.begin < end)
        pictures = replace(pictures, placed=there) if there else None
    return replace(row, input_ids=row.input_ids[begin:end], pictures=pictures)


def joined_pictures(
    batches: Sequence[Mapping[str, torch.Tensor]], line: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What lines say of pictures, for these lines one behind the other.

    Args:
        batches: the lines; those without pictures say nothing.
        line: what they have together beside that.
    """
    import torch

    names = dict.fromkeys(name for batch in batches for name in batch if "." not in name)
    found = {}
    for name in [one for one in names if one not in (*line, *_OF_LINES)]:
        having = [batch[name] for batch in batches if name in batch]
        if all(name not in b or b[name].shape == b["input_ids"].shape for b in batches):
            usual = int(name == "attention_mask")
            own = [b.get(name, torch.full_like(b["input_ids"], usual)) for b in batches]
            found[name] = torch.cat(own, dim=1)
        else:  # some models have a dimension for the pictures of a row
            alike = all(x.shape[1:] == having[0].shape[1:] for x in having)
            found[name] = torch.cat(having, dim=0 if alike else 1)
    return found
