"""The next token of each row of a batch, chosen for as many rows together as can be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lorakit.engine.choosing import choose_together
from lorakit.engine.rows import AnswerRow, precise, restrict_rows


def choose_next(rows: Sequence[AnswerRow], logits: torch.Tensor) -> None:
    """Has rows choose by their logits (rows, vocabulary); what is NaN or Inf ends the row."""
    largest = logits.amax(-1)  # NaN wherever a row has one
    ready: list[int] = []
    for at, (row, value) in enumerate(zip(rows, largest.tolist(), strict=True)):
        if not math.isfinite(value):
            row.fail_by_logits()
        elif row.read == len(row.prompt):
            ready.append(at)
    plain: list[int] = []
    if any(rows[at].is_plain for at in ready):
        plain = logits.max(-1).indices.tolist()
    together = [at for at in ready if rows[at].is_simple and not rows[at].is_plain]
    drawn: dict[int, tuple[int, float]] = {}
    if together:
        own = logits if len(together) == len(rows) else logits[together]
        asking = [rows[at] for at in together]
        places, own = _restricted(precise(own), asking)
        if places:
            choosers = [asking[place].chooser for place in places]
            found = zip(*choose_together(own, choosers), strict=True)
            drawn = dict(zip((together[place] for place in places), found, strict=True))
    for at in ready:
        row = rows[at]
        if row.is_plain:
            row.advance(logits[at], plain[at])
        elif not row.finished:
            row.advance(logits[at], *drawn.get(at, ()))


def _restricted(logits: torch.Tensor, rows: Sequence[AnswerRow]) -> tuple[list[int], torch.Tensor]:
    """Logits (rows, vocabulary) without what may not come next.

    Returns: the numbers of the rows that go on, and their logits; those that cannot are finished.
    """
    places = [place for place, row in enumerate(rows) if row.is_restricted]
    if not places:
        return [*range(len(rows))], logits
    changed = logits[places]  # a copy
    refused = restrict_rows(changed, [rows[place] for place in places])
    for number, error in refused.items():
        rows[places[number]].refuse(error)
    if len(places) < len(rows):
        changed = logits.index_copy(0, torch.tensor(places, device=logits.device), changed)
    if not refused:
        return [*range(len(rows))], changed
    left = [place for place, row in enumerate(rows) if not row.finished]
    return left, changed[left]
