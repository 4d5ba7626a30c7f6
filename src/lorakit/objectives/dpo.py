"""Direct preference optimisation: an adapter learns which of two answers is preferred.

With the log-ratio r(y) = log pi(y | x) - log pi_ref(y | x) of the chosen answer y+ and the rejected
one y-, the loss is -log sigmoid(beta (r(y+) - r(y-))) (Rafailov et al. 2023, arXiv:2305.18290).
Names, defaults and losses are those of TRL's `DPOConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, log1p
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from lorakit.objectives.objective import Settings
from lorakit.objectives.preference import Pairs, PreferencePairs

if TYPE_CHECKING:
    import torch


class DpoSettings(Settings):
    """TRL's settings of DPO.

    Attributes:
        beta: how strongly the adapter is kept near the reference; tau in the IPO paper.
        loss_type: one of `LOSSES`, or several, whose losses are added (MPO).
        loss_weights: a weight for each of several losses; None is 1 for each.
        label_smoothing: the share of labels that are taken to be wrong (`robust`), or epsilon
            (`exo_pair`).
        ld_alpha: what tokens count that are behind the length of the shorter answer, from 0 to 1
            (LD-DPO, Liu et al. 2024, arXiv:2409.06411); None for as much as others.
        precompute_ref_log_probs: compute the reference before the first step (again where a run
            is resumed) instead of in each; None where rows are seen more than once.
    """

    beta: float = Field(0.1, gt=0)
    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    ld_alpha: float | None = Field(None, ge=0, le=1)
    precompute_ref_log_probs: bool | None = None

    @field_validator("loss_type")
    @classmethod
    def _known(cls, value: str | list[str]) -> str | list[str]:
        given = [value] if isinstance(value, str) else value
        if not given or len(set(given)) < len(given) or set(given) - LOSSES.keys():
            raise ValueError(f"should be one of {', '.join(LOSSES)}, or a list of some of them")
        return value

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each loss by its name."""
        given = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        return dict(zip(given, self.loss_weights or [1.0] * len(given), strict=True))

    @model_validator(mode="after")
    def _fit_together(self) -> DpoSettings:
        given = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        if self.loss_weights is not None and len(self.loss_weights) != len(given):
            raise ValueError("loss_weights should have one weight for each of loss_type")
        if self.label_smoothing and not {"robust", "exo_pair"} & set(given):
            raise ValueError(
                "label_smoothing has an effect with loss_type robust and exo_pair alone"
            )
        if "exo_pair" in given and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0, such as 0.001")
        return self


class Dpo(PreferencePairs):
    """DPO and the losses that TRL's trainer has beside it."""

    name = "dpo"
    Settings = DpoSettings
    cure_of_falling = (
        "Add the cross-entropy of chosen answers (objective.loss_type=[sigmoid,sft], TRL's former "
        "rpo_alpha), lower training.learning_rate, or raise objective.beta."
    )

    def of_answers(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """As in `PreferencePairs`; with `ld_alpha` tokens behind the shorter answer count less."""
        import torch

        alpha = self.settings.ld_alpha
        if alpha is not None:
            begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
            shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2).repeat_interleave(lengths)
            place = torch.arange(len(tokens), device=tokens.device) - begins
            tokens = torch.where(place < shorter, tokens, alpha * tokens)
        return super().of_answers(tokens, lengths)

    def pair_losses(self, pairs: Pairs) -> torch.Tensor:
        """The weighted sum of the losses in `loss_type`."""
        weighted = (
            w * LOSSES[name](pairs, self.settings) for name, w in self.settings.losses.items()
        )
        first = next(weighted)
        return sum(weighted, first)


# --- the losses of pairs --------------------------------------------------------------------------


def _logsigmoid(x: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def _margin(log_ratios: torch.Tensor) -> torch.Tensor:
    return log_ratios[:, 0] - log_ratios[:, 1]


def sigmoid(pairs: Pairs, settings: Any) -> torch.Tensor:
    """-log sigmoid(beta (r+ - r-)), equation 7 of the DPO paper."""
    return -_logsigmoid(settings.beta * _margin(pairs.log_ratios))


def sigmoid_norm(pairs: Pairs, settings: Any) -> torch.Tensor:
    """As `sigmoid`, with log-ratios per token (Lambert et al. 2024, arXiv:2411.15124)."""
    return -_logsigmoid(settings.beta * _margin(pairs.log_ratios / pairs.lengths))


def hinge(pairs: Pairs, settings: Any) -> torch.Tensor:
    """max(0, 1 - beta (r+ - r-)) (Zhao et al. 2023, arXiv:2305.10425)."""
    return (1 - settings.beta * _margin(pairs.log_ratios)).relu()


def ipo(pairs: Pairs, settings: Any) -> torch.Tensor:
    """(r+ - r- - 1 / (2 beta))^2 with log-ratios per token (Azar et al. 2023, arXiv:2310.12036)."""
    return (_margin(pairs.log_ratios / pairs.lengths) - 1 / (2 * settings.beta)).square()


def robust(pairs: Pairs, settings: Any) -> torch.Tensor:
    """Unbiased where a share of the labels is wrong (Chowdhury et al. 2024, arXiv:2403.00409)."""
    margin, wrong = settings.beta * _margin(pairs.log_ratios), settings.label_smoothing
    return (wrong * _logsigmoid(-margin) - (1 - wrong) * _logsigmoid(margin)) / (1 - 2 * wrong)


def exo_pair(pairs: Pairs, settings: Any) -> torch.Tensor:
    """KL of the policy's preference from the labels' (Ji et al. 2024, arXiv:2402.00856, eq. 16)."""
    margin, wrong = settings.beta * _margin(pairs.log_ratios), settings.label_smoothing
    better = margin.sigmoid() * (_logsigmoid(margin) - log1p(-wrong))
    return better + (-margin).sigmoid() * (_logsigmoid(-margin) - log(wrong))


def nca_pair(pairs: Pairs, settings: Any) -> torch.Tensor:
    """Noise contrastive alignment of pairs (Chen et al. 2024, arXiv:2402.05369)."""
    rewards = settings.beta * pairs.log_ratios
    return -_logsigmoid(rewards[:, 0]) - 0.5 * _logsigmoid(-rewards).sum(1)


def bco_pair(pairs: Pairs, settings: Any) -> torch.Tensor:
    """Each answer classified by itself (Jung et al. 2024, arXiv:2404.04656), without the shift."""
    rewards = settings.beta * pairs.log_ratios
    return -_logsigmoid(rewards[:, 0]) - _logsigmoid(-rewards[:, 1])


def sppo_hard(pairs: Pairs, settings: Any) -> torch.Tensor:
    """(r+ - 1 / (2 beta))^2 + (r- + 1 / (2 beta))^2 (Wu et al. 2024, arXiv:2405.00675, eq. 4.7)."""
    half = 0.5 / settings.beta
    return (pairs.log_ratios[:, 0] - half).square() + (pairs.log_ratios[:, 1] + half).square()


def apo_zero(pairs: Pairs, settings: Any) -> torch.Tensor:
    """Chosen answers become likelier, rejected ones less (D'Oosterlinck 2024, arXiv:2408.06266)."""
    rewards = settings.beta * pairs.log_ratios
    return 1 - rewards[:, 0].sigmoid() + rewards[:, 1].sigmoid()


def apo_down(pairs: Pairs, settings: Any) -> torch.Tensor:
    """Chosen answers become less likely, rejected ones even less (equation 8 of the same)."""
    rewards = settings.beta * pairs.log_ratios
    return rewards[:, 0].sigmoid() + 1 - _margin(rewards).sigmoid()


def sft(pairs: Pairs, settings: Any) -> torch.Tensor:
    """The cross-entropy per token of the chosen answer, beside other losses.

    A mean over pairs of means over tokens; TRL takes the mean over all tokens of a batch, so that
    it depends on how a step is divided into batches.
    """
    return -pairs.mean_policy[:, 0]


LOSSES: dict[str, Callable[[Pairs, Any], torch.Tensor]] = {
    one.__name__: one
    for one in (
        *(sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair),
        *(nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, sft),
    )
}
"""TRL's names of the losses of a pair. Missing are `aot` and `aot_unpaired`, which sort a batch, so
that a step depends on how it is divided, and `discopop`."""
