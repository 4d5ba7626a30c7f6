"""The score that a model with a head of one output gives to a sequence: a reward model's.

transformers reads the head at a row's last token that is not padding; here it is read at the same
token of each sequence, whether rows are padded, lie in one line, or share a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.models.loaded import base_model

if TYPE_CHECKING:
    import torch
    from torch import nn


class SequenceScores:
    """Scores of a batch's sequences.

    Args:
        model: the model that will be called, or what is inside its wrappers; a causal one has its
            head in `score`, another one gives a logit a row.
    """

    def __init__(self, model: nn.Module) -> None:
        base = base_model(model)
        self.head: nn.Module | None = getattr(base, "score", None)
        self.pad_token_id: int = base.config.get_text_config().pad_token_id

    def __call__(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of the scores and their number (int64)."""
        import torch

        scores = self.of_sequences(model, batch)
        return scores.sum(), torch.tensor(len(scores))

    def of_sequences(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The scores (sequences,), in float32 or wider.

        Args:
            batch: `input_ids` (batch, seq) and what else the model's forward takes, as
                `data.batches` makes it. Names with a dot are an objective's own.
        """
        from lorakit.models.row_attention import rows_apart

        inputs: dict[str, Any] = {
            name: tensor for name, tensor in batch.items() if name != "labels" and "." not in name
        }
        of_tokens: list[torch.Tensor] = []
        handle = None
        if self.head is not None:  # of a causal model, which reads it at every token
            inputs["use_cache"] = False
            handle = self.head.register_forward_hook(lambda *given: of_tokens.append(given[2]))
        try:
            with rows_apart(batch):
                logits = model(**inputs).logits
        finally:
            if handle is not None:
                handle.remove()
        if of_tokens:
            logits = of_tokens[0].flatten(0, 1)[last_tokens(batch, self.pad_token_id)]
        scores = logits.squeeze(-1)
        return scores.float() if scores.element_size() < 4 else scores


def last_tokens(batch: Mapping[str, torch.Tensor], pad_token_id: int) -> torch.Tensor:
    """Where in a batch's tokens (batch * seq,) each sequence's last one is (sequences,).

    Padding is known by its token, as in transformers: where that is the end token too, it is the
    token before the end.
    """
    import torch

    ids = batch["input_ids"]
    rows, length = ids.shape
    places = torch.arange(length, device=ids.device).expand(rows, length)
    last = torch.where(ids != pad_token_id, places, 0).cummax(dim=1).values
    if "cu_seq_lens_q" not in batch:
        return torch.arange(rows, device=ids.device) * length + last[:, -1]
    ends = last[0, batch["cu_seq_lens_q"][1:].long() - 1]
    if (parents := batch.get("parents")) is None:
        return ends
    is_prefix = torch.zeros_like(parents, dtype=torch.bool)
    is_prefix[parents[parents >= 0].long()] = True
    return ends[~is_prefix]
