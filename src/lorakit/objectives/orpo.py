"""ORPO: answers and preferences are learned in one stage, without reference.

L = -log P(y+ | x) - beta log sigmoid(log odds(y+ | x) - log odds(y- | x)), where log P is the mean
log-probability of an answer's tokens and odds = P / (1 - P) (Hong et al. 2024, arXiv:2403.07691,
equations 4, 6 and 7). TRL's trainer differs from the paper in the first term: it learns the tokens
of the prompt too, and takes the mean over all tokens of a batch instead of each answer's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from lorakit.objectives.preference import Pairs, PreferencePairs
from lorakit.objectives.settings import Settings

if TYPE_CHECKING:
    import torch


class OrpoSettings(Settings):
    """Settings of ORPO.

    Attributes:
        beta: the weight of the odds ratio; lambda in the paper.
    """

    beta: float = Field(0.1, gt=0)


class Orpo(PreferencePairs):
    """Odds ratio preference optimisation."""

    name = "orpo"
    Settings = OrpoSettings
    reference = None
    # It learns answers as well: between supervised fine-tuning and DPO (8e-6 for 7B in the paper,
    # where all weights are trained; LoRA takes about ten times of that).
    learning_rates: ClassVar[Mapping[str, float]] = {"small": 2e-4, "medium": 8e-5, "large": 5e-5}

    def pair_losses(self, pairs: Pairs) -> torch.Tensor:
        """Cross-entropy of the chosen answer and the odds ratio, of each pair."""
        from torch.nn.functional import logsigmoid

        mean = pairs.mean_policy
        log_odds = mean - log1mexp(mean)
        return -mean[:, 0] - self.settings.beta * logsigmoid(log_odds[:, 0] - log_odds[:, 1])

    def rewards(self, pairs: Pairs) -> torch.Tensor:
        """beta times the mean log-probability of an answer's tokens."""
        rewards: torch.Tensor = self.settings.beta * pairs.mean_policy
        return rewards


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of negative x, precise near 0 and far from it (Mächler 2012)."""
    import torch

    x = x.clamp(max=-torch.finfo(x.dtype).tiny)  # of an answer that is certain
    near = x > -0.6931471805599453
    # The branch that is not taken must have a finite gradient too.
    small, large = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
