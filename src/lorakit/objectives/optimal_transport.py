"""Preferences by optimal transport: log-ratios are compared by rank, over all pairs of a step.

AOT lets the distribution of chosen answers dominate that of rejected ones (Melnyk et al. 2024,
arXiv:2406.05882): both are sorted, and the values of each rank are compared. TRL sorts a batch by
itself, so that its loss depends on how a step is divided. Here a pair finds its rank among all
pairs of the optimizer step (`Pairs.step`, taken without dropout and gradients beforehand): in a
step of one batch the loss and its gradients are TRL's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from lorakit.objectives.preference import Pairs


def aot(pairs: Pairs, settings: Any) -> torch.Tensor:
    """-log sigmoid(beta d) with d = log pi(y+) - log pi(y-), less the reference's of this rank."""
    policy, reference = pairs.policy, (pairs.step or pairs).reference
    own = policy[:, 0] - policy[:, 1]
    everything = (pairs.step or pairs).policy.detach()
    ranked = (everything[:, 0] - everything[:, 1]).sort().values
    others = (reference[:, 0] - reference[:, 1]).sort().values
    return _smoothed(own - others[_ranks(own, ranked)], settings)


def aot_unpaired(pairs: Pairs, settings: Any) -> torch.Tensor:
    """-log sigmoid(beta d) with d = r(y+) - r(y-) of the chosen and the rejected answer of a rank.

    Each answer's own term has the gradient of its log-ratio alone; both terms of a rank are the
    same number, and half of each counts.
    """
    chosen, rejected = pairs.log_ratios.unbind(1)
    ratios = (pairs.step or pairs).log_ratios.detach()
    best, worst = (column.sort().values for column in ratios.unbind(1))
    first = _smoothed(chosen - worst[_ranks(chosen, best)], settings)
    second = _smoothed(best[_ranks(rejected, worst)] - rejected, settings)
    both = first + second
    return both - both.detach() / 2


def _smoothed(difference: torch.Tensor, settings: Any) -> torch.Tensor:
    from torch.nn.functional import logsigmoid

    scaled, wrong = settings.beta * difference, settings.label_smoothing
    return -(1 - wrong) * logsigmoid(scaled) - wrong * logsigmoid(-scaled)


def _ranks(values: torch.Tensor, ranked: torch.Tensor) -> torch.Tensor:
    """Of each value (n,) the position of the nearest in `ranked` (N,), which is sorted."""
    import torch

    values = values.detach().contiguous()
    behind = torch.searchsorted(ranked, values).clamp(max=len(ranked) - 1)
    before = (behind - 1).clamp(min=0)
    is_nearer = (values - ranked[before]).abs() <= (ranked[behind] - values).abs()
    return torch.where(is_nearer, before, behind)
