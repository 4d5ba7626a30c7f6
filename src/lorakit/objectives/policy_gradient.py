"""The losses of sampled completions: what every token costs, and what the sum is divided by.

A loss type is a function from the tokens of a batch to the loss of each, and one line in `LOSSES`
with how tokens are added up. Names, defaults and formulas are those of TRL's `GRPOTrainer`, whose
`loss_type` they are; all of them are normalised over the whole optimizer step, however it is
divided into batches and processes. Where advantages come from is `advantages.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Level = Literal["token", "sequence"]


@dataclass(frozen=True)
class Completions:
    """The sampled tokens of S completions, one completion after the other, n in all.

    Args:
        log_probs: (n,) of the policy that is trained, in nats, with their graph.
        old: (n,) of the policy that sampled.
        lengths: (S,) int64, the tokens of each completion that count; 0 for one that is masked.
        advantages: (S,).
        level: whether the ratio is taken of each token, or of the whole sequence.
    """

    log_probs: torch.Tensor
    old: torch.Tensor
    lengths: torch.Tensor
    advantages: torch.Tensor
    level: Level = "token"

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """The value of each completion (S,) at each of its tokens (n,)."""
        return values.repeat_interleave(self.lengths)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """The sums (S,) of values of tokens (n,)."""
        import torch

        owner = self.spread(torch.arange(len(self.lengths), device=values.device))
        return values.new_zeros(len(self.lengths)).index_add(0, owner, values)

    def means(self, values: torch.Tensor) -> torch.Tensor:
        """The means (S,) of values of tokens (n,); 0 for completions without any."""
        return self.sums(values) / self.lengths.clamp(min=1)

    @property
    def token_advantages(self) -> torch.Tensor:
        """(n,)."""
        return self.spread(self.advantages.to(self.log_probs))

    @property
    def log_ratios(self) -> torch.Tensor:
        """log pi(token) - log pi_old(token) (n,)."""
        return self.log_probs - self.old

    @property
    def ratios(self) -> torch.Tensor:
        """The importance ratio at each token (n,).

        At the level of sequences it is exp of the mean of the tokens' log-ratios (GSPO, Zheng et
        al. 2025, arXiv:2507.18071, eq. 7).
        """
        if self.level == "token":
            return self.log_ratios.exp()
        return self.spread(self.means(self.log_ratios).exp())


# --- the loss of every token ----------------------------------------------------------------------


def clipped(c: Completions, settings: Any) -> torch.Tensor:
    """-min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A) (n,).

    PPO's (Schulman et al. 2017, arXiv:1707.06347, eq. 7), with a higher upper bound (DAPO, Yu et
    al. 2025, arXiv:2503.14476) and a bound for negative advantages (INTELLECT-2, arXiv:2505.07291).
    """
    import torch

    r, A = c.ratios, c.token_advantages
    within = r.clamp(1 - settings.epsilon, 1 + settings.upper_epsilon)
    if settings.delta is not None:
        r = r.clamp(max=settings.delta)
    return -torch.min(r * A, within * A)


def cispo(c: Completions, settings: Any) -> torch.Tensor:
    """-sg(min(r, epsilon_high)) A log pi (n,) (MiniMax-M1, arXiv:2506.13585, eq. 4)."""
    weights = c.ratios.clamp(max=settings.upper_epsilon).detach()
    return -weights * c.token_advantages * c.log_probs


def sapo(c: Completions, settings: Any) -> torch.Tensor:
    """-sigmoid(tau (r - 1)) 4 / tau A (n,), tau by the sign of A (arXiv:2511.20347)."""
    import torch

    A = c.token_advantages
    positive, negative = settings.sapo_temperature_pos, settings.sapo_temperature_neg
    tau = torch.where(A > 0, A.new_tensor(positive), A.new_tensor(negative))
    return -(tau * (c.ratios - 1)).sigmoid() * 4 / tau * A


def vespo(c: Completions, settings: Any) -> torch.Tensor:
    """-phi(w) A log pi (n,), w the ratio of the whole sequence (arXiv:2602.10693).

    phi(w) = exp(lambda) w^k exp(-lambda w), without a gradient; k and lambda by the sign of A.
    """
    import torch

    with torch.no_grad():
        log_w = c.sums(c.log_ratios.clamp(-20, 20)).clamp(math.log(1e-8), 20)
        up = c.advantages >= 0
        k = torch.where(up, settings.vespo_k_pos, settings.vespo_k_neg)
        rate = torch.where(up, settings.vespo_lambda_pos, settings.vespo_lambda_neg).clamp(min=1e-4)
        phi = (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0, posinf=0, neginf=0)
    return -c.spread(phi) * c.token_advantages * c.log_probs


def kl(c: Completions, reference: torch.Tensor, corrected: bool) -> torch.Tensor:
    """The KL from the reference at each token (n,): q/p - log(q/p) - 1, "k3" (Schulman 2020).

    Args:
        reference: the reference's log-probabilities (n,).
        corrected: times the importance ratio, so that its gradient is that of the reverse KL
            (DeepSeek-V3.2, arXiv:2512.02556).
    """
    log_ratios = reference - c.log_probs
    found = log_ratios.exp() - log_ratios - 1
    return found * c.ratios if corrected else found


def near_enough(c: Completions, threshold: float) -> torch.Tensor:
    """1 for tokens of completions that count, 0 for those that the policy has moved away from (n,).

    These have a negative advantage and a mean of log pi_old - log pi above `threshold`
    (DeepSeek-V3.2, arXiv:2512.02556, eq. 9).
    """
    moved = c.means(-c.log_ratios.detach())
    kept = (c.advantages >= 0) | (moved <= threshold)
    return c.spread(kept.to(c.log_probs))


def most_uncertain(entropies: torch.Tensor, of_step: torch.Tensor, share: float) -> torch.Tensor:
    """1 for tokens (n,) whose entropy is among the highest of a step, 0 for the others
    (Wang et al. 2025, arXiv:2506.01939); TRL's `top_entropy_quantile`.

    Args:
        of_step: the entropies of all tokens of the step.
        share: how many of them count, in (0, 1].
    """
    import torch

    if share == 1 or not len(of_step):
        return torch.ones_like(entropies)
    least = torch.quantile(of_step.float(), 1 - share)
    return (entropies >= least.to(entropies)).to(entropies)


def truncated_ratio(own: torch.Tensor, sampled: torch.Tensor, most: float) -> torch.Tensor:
    """min(pi / mu, most) of each token (n,), for a sampler mu whose numbers are not the trainer's.

    TRL's `token_truncate` (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training").

    Args:
        own, sampled: (n,) log-probabilities of both, in nats.
    """
    return (own - sampled).exp().clamp(max=most)


# --- how tokens are added up ----------------------------------------------------------------------


@dataclass(frozen=True)
class Normalisation:
    """How the losses of tokens become one number.

    Attributes:
        total: the sum (…) over a batch, of losses (n,).
        count: what the sum over all batches of an optimizer step is divided by, as the sum of
            these over its batches: by a batch's tokens, its completions, and the settings.
    """

    total: Callable[[torch.Tensor, Completions], torch.Tensor]
    count: Callable[[int, int, Any], int]


BY_TOKENS = Normalisation(lambda x, c: x.sum(), lambda tokens, completions, s: tokens)
BY_COMPLETIONS = Normalisation(
    lambda x, c: c.means(x).sum(), lambda tokens, completions, s: completions
)
BY_SUMS = Normalisation(lambda x, c: x.sum(), lambda tokens, completions, s: completions)
BY_LARGEST = Normalisation(
    lambda x, c: x.sum(), lambda tokens, completions, s: completions * s.max_completion_length
)


@dataclass(frozen=True)
class PolicyLoss:
    """A loss type.

    Attributes:
        of_tokens: the loss of each token (n,).
        normalisation: how these are added up.
        level: of ratios, where only one is meant.
    """

    of_tokens: Callable[[Completions, Any], torch.Tensor]
    normalisation: Normalisation
    level: Level | None = None


LOSSES = {
    "grpo": PolicyLoss(clipped, BY_COMPLETIONS),
    "dr_grpo": PolicyLoss(clipped, BY_LARGEST),
    "dapo": PolicyLoss(clipped, BY_TOKENS),
    "bnpo": PolicyLoss(clipped, BY_TOKENS),
    "gspo": PolicyLoss(clipped, BY_COMPLETIONS, "sequence"),
    "luspo": PolicyLoss(clipped, BY_SUMS),
    "cispo": PolicyLoss(cispo, BY_TOKENS),
    "sapo": PolicyLoss(sapo, BY_COMPLETIONS),
    "vespo": PolicyLoss(vespo, BY_TOKENS),
}
"""By TRL's names, and `gspo`, which is its `grpo` at the level of sequences."""
