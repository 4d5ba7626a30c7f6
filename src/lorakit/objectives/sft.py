"""Supervised fine-tuning: the cross-entropy of the answers' tokens, or of all tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lorakit.data.masking import IGNORE, WeightedRow
from lorakit.errors import InputError
from lorakit.objectives import settings as kinds
from lorakit.objectives.batch_sums import Loss
from lorakit.objectives.forward import Forward
from lorakit.objectives.objective import Batch, Collate, Objective

if TYPE_CHECKING:
    import torch

    from lorakit.data.masking import TokenizedRow
    from lorakit.data.samples import Sample

_WEIGHTS = "loss.weights"
"""The tensor (n,) of what each supervised token's loss is scaled by, where not all of it is 1."""


class Sft(Objective):
    """Answers of conversations and plain texts, learned token by token.

    The loss is sum_t w_t * -log p(x_t | x_<t) over the supervised tokens, divided by their number;
    w_t is the weight of the message that the token stands in, 1 where it has none.
    """

    name = "sft"
    row_settings: ClassVar[Sequence[str]] = ("learn",)
    shares_passes = True

    class Settings(kinds.Settings):
        """Which answers are learned.

        Attributes:
            learn: `all` answers (TRL's `assistant_only_loss`); the `last` of each conversation;
                those of the `completion`, and none in its prompt (TRL's `completion_only_loss`).
        """

        learn: Literal["all", "last", "completion"] = "all"

    # --- rows -------------------------------------------------------------------------------

    def as_learned(self, sample: Sample) -> Sample:
        """The sample with the answers that are not learned among those that are only read.

        Raises:
            InputError: the completion is learned, and the row has none or nothing to learn in it.
        """
        learn, learned = self.settings.learn, sample.learned
        if learn == "all" or sample.text is not None:
            return sample
        if learn == "last":
            return replace(sample, unlearned=sample.unlearned | {*learned[:-1]})
        if not sample.completion:
            raise InputError(
                f"{sample.where}: has no completion beside a prompt, which objective.learn "
                "completion learns: write such rows, or give learn: last"
            )
        begin = len(sample.messages) - sample.completion
        if learned[-1] < begin:
            raise InputError(f"{sample.where}: nothing of its completion is learned; drop the row")
        return replace(sample, unlearned=sample.unlearned | {i for i in learned if i < begin})

    def to_batch(self, rows: Sequence[TokenizedRow], collate: Collate) -> dict[str, torch.Tensor]:
        """The tensors of a batch, and the weights of its tokens where there are some."""
        batch = super().to_batch(rows, collate)
        if not any(isinstance(row, WeightedRow) for row in rows):
            return batch
        return {**batch, _WEIGHTS: token_weights(rows, collate)}

    # --- loss -------------------------------------------------------------------------------

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The summed negative log-likelihood of the supervised tokens, in nats."""
        losses = forward.token_losses(batch)
        if (weights := batch.get(_WEIGHTS)) is not None:
            losses = losses * weights.to(losses.dtype)
        return Loss(losses.sum(), self.count(batch))


def token_weights(rows: Sequence[TokenizedRow], collate: Collate) -> torch.Tensor:
    """What the loss of each supervised token (n,) is scaled by, in the order of the batch.

    The batch is made once more with numbers of weights in place of labels, so that it is the
    collator that says where each token stands.
    """
    import torch

    values, numbered = [1.0], []
    for row in rows:
        numbers = [IGNORE if label == IGNORE else 0 for label in row.labels]
        for begin, end, weight in row.weights if isinstance(row, WeightedRow) else ():
            for i in range(begin, min(end, len(numbers))):
                if numbers[i] != IGNORE:
                    numbers[i] = len(values)
            values.append(weight)
        numbered.append(replace(row, labels=numbers))
    labels: Any = collate(numbered)["labels"][:, 1:]
    return torch.tensor(values)[labels[labels != IGNORE]]
