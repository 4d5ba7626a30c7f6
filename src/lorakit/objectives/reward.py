"""A reward model: a new head with one output learns to score the chosen answer higher.

With the scores r of both conversations the loss is -log sigmoid(r(x, y+) - r(x, y-) - m), the
Bradley-Terry model (Ouyang et al. 2022, arXiv:2203.02155, equation 1), with the margin m that a
row may have (Touvron et al. 2023, arXiv:2307.09288, equation 2). Names and defaults are those of
TRL's `RewardConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from lorakit.data.labelled import Labels
from lorakit.data.preference_rows import PairSample
from lorakit.data.preference_tokens import PairRow, tokenize_pair
from lorakit.errors import listed
from lorakit.models.sequence_scores import SequenceScores
from lorakit.objectives.batch_sums import Loss
from lorakit.objectives.forward import supervised_per_sequence
from lorakit.objectives.objective import Batch, Collate, Objective, TrainingInputs
from lorakit.objectives.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.masking import TokenizedRow
    from lorakit.data.samples import Sample
    from lorakit.objectives.forward import Forward
    from lorakit.objectives.run_request import RunRequest

HEAD = ("reward",)
"""The name of the head's one output."""

_MARGIN = "pair.margin"


class RewardSettings(Settings):
    """TRL's settings of reward models.

    Attributes:
        center_rewards_coefficient: what the squared sum of a pair's scores costs, which keeps
            scores around 0 (Eisenstein et al. 2023, arXiv:2312.09244, equation 2); 0.01 is usual.
    """

    center_rewards_coefficient: float | None = Field(None, ge=0)


class Reward(Objective):
    """Bradley-Terry reward model: its head is trained whole and saved beside the adapter."""

    name = "reward"
    task_type = "SEQ_CLS"
    unit = "pair"
    row_kinds = ("preference",)
    smooths_labels = False
    recommended_for = "classification"
    learning_rates: ClassVar[Mapping[str, float]] = {"small": 2e-4, "medium": 1e-4, "large": 5e-5}
    epochs: ClassVar[Sequence[tuple[int, int]]] = ((1_000, 3), (5_000, 2))
    Settings = RewardSettings
    head = HEAD
    answers = False

    score_names = ("accuracy", "margin", "rewards/chosen", "rewards/rejected")
    lower_is_better = ("rewards/rejected",)
    shown_metrics: ClassVar[Sequence[str]] = ("accuracy", "margin")

    # --- rows to batches --------------------------------------------------------------------

    def prepare(self, request: RunRequest) -> TrainingInputs:
        """Loads the model with its new head and reads the rows."""
        inputs = super().prepare(request)
        self.labels = Labels(HEAD, {})
        inputs.data.notices.append(
            f"trained whole and saved with the adapter: {listed(inputs.new_modules)} "
            f"({self.task_type})"
        )
        return inputs

    def tokenize(
        self, sample: Any, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> TokenizedRow:
        """Both conversations of a pair (`data.preference_tokens`), or one to be scored alone."""
        if isinstance(sample, PairSample):
            return tokenize_pair(sample, tokenizer, max_length)
        return super().tokenize(sample, tokenizer, max_length)

    def to_batch(self, rows: Sequence[TokenizedRow], collate: Collate) -> dict[str, torch.Tensor]:
        """The conversations, with the margins of pairs that have one."""
        import torch

        batch = super().to_batch(rows, collate)
        margins = [row.margin for row in rows if isinstance(row, PairRow)]
        if any(margin is not None for margin in margins):
            batch[_MARGIN] = torch.tensor([m or 0.0 for m in margins], dtype=torch.float64)
        return batch

    # --- loss and scores --------------------------------------------------------------------

    def reader(self, model: nn.Module, own_logits: bool) -> SequenceScores:
        """The scores of conversations."""
        return SequenceScores(model)

    def count(self, batch: Batch) -> int:
        """The pairs."""
        return len(supervised_per_sequence(batch)) // 2

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The summed loss of the pairs, with their scores."""
        return self.loss_of(forward.sequence_scores(batch), batch)

    def loss_of(self, scores: torch.Tensor, batch: Batch) -> Loss:
        """The same of scores (2 * pairs,), in which each chosen answer precedes the rejected."""
        from torch.nn.functional import logsigmoid

        chosen, rejected = scores.view(-1, 2).unbind(1)
        difference = chosen - rejected
        margins = batch.get(_MARGIN)
        beaten = difference if margins is None else difference - margins.to(difference)
        losses = -logsigmoid(beaten)
        if (weight := self.settings.center_rewards_coefficient) is not None:
            losses = losses + weight * (chosen + rejected).square()
        difference = difference.detach()
        right = (difference > 0).to(scores) + (difference == 0).to(scores) / 2
        values = (right, difference, chosen.detach(), rejected.detach())
        sums = (value.sum() for value in values)
        metrics = dict(zip(self.score_names, sums, strict=True))
        return Loss(losses.sum(), self.count(batch), metrics)

    def prompts(self, samples: Sequence[Any]) -> list[Sample]:
        """None: it scores answers and writes none."""
        return []
