"""Supervised fine-tuning: the cross-entropy of the answers' tokens, or of all tokens of a text."""

from __future__ import annotations

from lorakit.objectives.forward import Forward
from lorakit.objectives.objective import Batch, Loss, Objective


class Sft(Objective):
    """Answers of conversations and plain texts, learned token by token."""

    name = "sft"

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The summed negative log-likelihood of the supervised tokens, in nats."""
        return Loss(forward.token_losses(batch).sum(), self.count(batch))
