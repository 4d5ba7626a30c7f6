"""SimPO: preferences by the mean log-probability of answers, with a margin and without reference.

-log sigmoid(beta (log pi(y+ | x) / |y+| - log pi(y- | x) / |y-|) - gamma) (Meng et al. 2024,
arXiv:2405.14734, equation 6). Names are those of TRL's `CPOConfig` with `loss_type="simpo"`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from lorakit.objectives.preference import Pairs, PreferencePairs
from lorakit.objectives.settings import Settings

if TYPE_CHECKING:
    import torch


class SimpoSettings(Settings):
    """Settings of SimPO.

    Attributes:
        beta: scales the mean log-probabilities; 2 to 2.5 in the paper.
        simpo_gamma: the margin by which the chosen answer is to win; 0.3 to 1.6 in the paper.
        label_smoothing: the share of labels that are taken to be wrong.
    """

    beta: float = Field(2.0, gt=0)
    simpo_gamma: float = Field(0.5, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)


class Simpo(PreferencePairs):
    """Simple preference optimisation."""

    name = "simpo"
    Settings = SimpoSettings
    reference = None

    def pair_losses(self, pairs: Pairs) -> torch.Tensor:
        """Equation 6 of the paper; with smoothing also its loss for the other label."""
        from torch.nn.functional import logsigmoid

        rewards, wrong = self.rewards(pairs), self.settings.label_smoothing
        margin = rewards[:, 0] - rewards[:, 1] - self.settings.simpo_gamma
        return -(1 - wrong) * logsigmoid(margin) - wrong * logsigmoid(-margin)

    def rewards(self, pairs: Pairs) -> torch.Tensor:
        """beta times the mean log-probability of an answer's tokens."""
        rewards: torch.Tensor = self.settings.beta * pairs.mean_policy
        return rewards
