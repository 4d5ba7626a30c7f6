"""Batches of several adapters laid side by side, and the losses of each out of one pass.

In a line the rows of one adapter come behind those of the other; padded, they are blocks of rows.
The route says where each adapter's part begins and ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorakit.lora.model import LoraModel
from lorakit.lora.routing import Route
from lorakit.lora.streams import Stream
from lorakit.models.loss import IGNORE, SupervisedLoss

Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """An adapter's own batch, as it would have it alone.

    Args:
        name: the adapter's.
        divisor: what its summed loss is divided by.
        stream: what its dropout is drawn from.
        smoothing: of its labels.
    """

    name: str
    batch: Batch
    divisor: torch.Tensor | int = 1
    stream: Stream | None = None
    smoothing: float = 0.0

    @property
    def size(self) -> int:
        """Its rows, or its tokens where they lie in a line."""
        rows, tokens = self.batch["input_ids"].shape
        return tokens if "cu_seq_lens_q" in self.batch else rows

    @property
    def tokens(self) -> int:
        """The positions that are computed for it."""
        return self.batch["input_ids"].numel()


def side_by_side(parts: Sequence[Part], pad_token_id: int) -> tuple[dict[str, torch.Tensor], Route]:
    """The batch of all parts, and who is where in it.

    Args:
        pad_token_id: what shorter rows are filled with, where rows are padded.
    """
    batches = [part.batch for part in parts]
    if "cu_seq_lens_q" in batches[0]:
        whole = _in_one_line(batches)
    else:
        whole = _in_blocks(batches, pad_token_id)
    shape = whole["input_ids"].shape
    widths = tuple(part.batch["input_ids"].shape[1] for part in parts)
    in_line = "cu_seq_lens_q" in whole
    route = Route(
        rows=tuple(part.name for part in parts),
        shape=(shape[0], shape[1]),
        sizes=tuple(part.size for part in parts),
        widths=None if in_line or len(set(widths)) == 1 else widths,
        streams=tuple(part.stream for part in parts),
    )
    return whole, route


def _in_one_line(batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    begins, at = [batches[0]["cu_seq_lens_q"][:1]], 0
    for batch in batches:
        begins.append(batch["cu_seq_lens_q"][1:] + at)
        at += batch["input_ids"].shape[1]
    where = torch.cat(begins)
    names = ("input_ids", "position_ids", "labels")
    whole = {name: torch.cat([batch[name] for batch in batches], dim=1) for name in names}
    whole |= {"cu_seq_lens_q": where, "cu_seq_lens_k": where}
    if any("parents" in batch for batch in batches):
        whole["parents"] = torch.cat(_parents_in_one_line(batches))
    return whole


def _parents_in_one_line(batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Each batch's `parents`, counted from the first segment of all; -1 stays none."""
    found, at = [], 0
    for batch in batches:
        segments = len(batch["cu_seq_lens_q"]) - 1
        own = batch.get("parents")
        if own is None:
            own = batch["cu_seq_lens_q"].new_full((segments,), -1)
        found.append(torch.where(own < 0, own, own + at))
        at += segments
    return found


def _in_blocks(batches: Sequence[Batch], pad_token_id: int) -> dict[str, torch.Tensor]:
    width = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE}
    return {
        name: torch.cat(
            [F.pad(batch[name], (0, width - batch[name].shape[1]), value=v) for batch in batches]
        )
        for name, v in fill.items()
    }


def losses_of(
    model: LoraModel, loss: SupervisedLoss, parts: Sequence[Part], pad_token_id: int
) -> list[torch.Tensor]:
    """The loss of every supervised token of each part, in nats, out of one forward pass.

    Activation checkpointing comes back to the route that is in force here.
    """
    whole, route = side_by_side(parts, pad_token_id)
    counts = torch.stack([loss.count(part.batch["labels"]) for part in parts]).tolist()
    smoothing: float | torch.Tensor = 0.0
    if any(part.smoothing for part in parts):
        own = torch.tensor([part.smoothing for part in parts], dtype=torch.float64)
        smoothing = own.repeat_interleave(torch.tensor(counts)).to(whole["labels"].device)
    with model.routing.using(route):
        losses = loss.of_tokens(model, whole, smoothing)
    return list(losses.split(counts))


def step_together(
    model: LoraModel, loss: SupervisedLoss, parts: Sequence[Part], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """One pass forwards and one backwards; each adapter's gradients are those of its own loss.

    Returns: the loss of each adapter, its sum over tokens divided by its divisor.
    """
    found = [
        own.sum() / part.divisor
        for own, part in zip(losses_of(model, loss, parts, pad_token_id), parts, strict=True)
    ]
    # No adapter has a parameter in another's loss, so that the sum's gradients are each one's own.
    torch.stack(found).sum().backward()
    return {part.name: value.detach() for part, value in zip(parts, found, strict=True)}
