"""What is measured of completions and of a step on them: sums that add up, and names for them.

Names are TRL's where it has them. Sums are taken of each batch, added over batches, processes and
the steps between two logs, and read at the end (`named`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lorakit.objectives.batch_sums import MAX
from lorakit.objectives.completion_rows import PREFIX

if TYPE_CHECKING:
    import torch

    from lorakit.objectives.policy_gradient import Completions

LEAST_NAMES = ("reward", "completions/mean_length", "completions/clipped_ratio")
"""The scores of held-out prompts, beside those of each reward."""

SHOWN = {
    "reward": "reward",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "completions/mean_length": "mean_length",
    "entropy": "entropy",
    "sampling/sampling_logp_difference/max": "gap",
}
"""What is shown while training, with its label; the gap is that of sampler and trainer, in nats."""

TRAINED = (
    *("reward", "reward_std", "frac_reward_zero_std", "groups_resampled"),
    *("completions/mean_length", "completions/min_length", "completions/max_length"),
    *("completions/clipped_ratio", "completions/mean_terminated_length"),
    "completions/reward_length_correlation",
    *("entropy", "kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    *("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
    "environment/",
)
"""What is logged while training, beside the means and deviations of each reward.

What ends with `/` is how the names of `Rollout.metrics` begin.
"""


class RolloutMeans:
    """The means of `Rollout.metrics` by name, over the rollouts that have them."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, rollouts: Iterable[Mapping[str, float]]) -> None:
        """Takes in those of some rollouts."""
        for metrics in rollouts:
            for name, value in metrics.items():
                self._values.setdefault(name, []).append(value)

    def taken(self) -> dict[str, float]:
        """The means since the last time."""
        values, self._values = self._values, {}
        return {name: fmean(own) for name, own in values.items()}


def of_completions(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums over a batch's completions: their rewards and lengths, and groups without signal."""
    import torch

    def values(name: str) -> torch.Tensor:
        return batch[PREFIX + name]

    reward, sizes, cut_off = values("reward"), values("sizes"), values("cut_off")
    found = {
        **_moments("reward", reward[:, None]),
        **_moments("rewards", values("rewards")),
        "completions": torch.tensor(len(sizes)),
        "length": sizes.sum(),
        "cut_off": cut_off.sum(),
        "terminated": (sizes * ~cut_off).sum(),
        "groups": torch.tensor(len(values("signal"))),
        "zero_std": (~values("signal")).sum(),
        "replaced": values("replaced").sum(),
        "length.squares": (sizes.square() * ~reward.isnan()).sum(),
        "reward.length": (reward * sizes).nansum(),
        "reward.lengths": (sizes * ~reward.isnan()).sum(),
    }
    if PREFIX + "advantages" in batch:
        found |= {f"{MAX}length": sizes.max(), f"{MAX}shortness": -sizes.min()}
    return found


def of_sampled(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums over tokens that are not computed again: their entropy is estimated by their own
    log-probabilities, whose expectation it is."""
    import torch

    logprobs = batch[PREFIX + "logprobs"]
    return {"tokens": torch.tensor(len(logprobs)), "entropy": -logprobs.sum()}


def _moments(name: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Number, sum and sum of squares of what is not NaN in each column (N, F)."""
    return {
        f"{name}.count": (~values.isnan()).sum(0),
        f"{name}.sum": values.nansum(0),
        f"{name}.squares": values.square().nansum(0),
    }


def of_tokens(
    c: Completions,
    entropies: torch.Tensor,
    kl: torch.Tensor | None,
    gap: torch.Tensor,
    settings: Any,
) -> dict[str, torch.Tensor]:
    """Sums over a batch's sampled tokens (n,): entropy, KL, clipped ratios, and the gap.

    Args:
        gap: by how much the log-probabilities of sampler and trainer differ, of the tokens whose
            weights are those that sampled them.
    """
    import torch

    ratios, A = c.ratios.detach(), c.token_advantages
    cispo = settings.loss_type == "cispo"
    low = (ratios < 1 - settings.epsilon) & (A < 0) & (not cispo)
    bound = settings.upper_epsilon + (0 if cispo else 1)
    high = (ratios > bound) & (A > 0)
    return {
        "tokens": torch.tensor(len(entropies)),
        "entropy": entropies.sum(),
        **({} if kl is None else {"kl": kl.detach().sum()}),
        "clipped_low": low.sum(),
        "clipped_high": high.sum(),
        "gap": gap.double().sum(),
        "fresh": torch.tensor(len(gap)),
        f"{MAX}gap": gap.max() if len(gap) else gap.new_zeros(()),
    }


def named(sums: Mapping[str, torch.Tensor], rewards: Sequence[str]) -> dict[str, float]:
    """The metrics by TRL's names; of held-out prompts the means alone.

    Args:
        rewards: the names of the reward functions.
    """
    completions, groups = float(sums["completions"]), float(sums["groups"])
    ended = completions - float(sums["cut_off"])
    found: dict[str, float] = {}
    [(found["reward"], reward_std)] = _mean_and_std(sums, "reward")
    each = dict(zip(rewards, _mean_and_std(sums, "rewards"), strict=True))
    found |= {f"rewards/{name}/mean": mean for name, (mean, _) in each.items()}
    found |= {
        "completions/mean_length": float(sums["length"]) / completions,
        "completions/clipped_ratio": float(sums["cut_off"]) / completions,
    }
    if "tokens" in sums:
        found |= {f"rewards/{name}/std": std for name, (_, std) in each.items()}
        found |= {
            "reward_std": reward_std,
            "frac_reward_zero_std": float(sums["zero_std"]) / groups,
            "completions/reward_length_correlation": _correlation(sums),
        }
        tokens = max(1.0, float(sums["tokens"]))
        found |= {
            "groups_resampled": float(sums["replaced"]),
            "completions/min_length": -float(sums[f"{MAX}shortness"]),
            "completions/max_length": float(sums[f"{MAX}length"]),
            "completions/mean_terminated_length": float(sums["terminated"]) / max(1.0, ended),
            "entropy": float(sums["entropy"]) / tokens,
            "clip_ratio/low_mean": float(sums["clipped_low"]) / tokens,
            "clip_ratio/high_mean": float(sums["clipped_high"]) / tokens,
            "clip_ratio/region_mean": float(sums["clipped_low"] + sums["clipped_high"]) / tokens,
        }
        if "kl" in sums:
            found["kl"] = float(sums["kl"]) / tokens
        if fresh := float(sums["fresh"]):
            name = "sampling/sampling_logp_difference"
            found[f"{name}/mean"] = float(sums["gap"]) / fresh
            found[f"{name}/max"] = float(sums[f"{MAX}gap"])
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _mean_and_std(sums: Mapping[str, torch.Tensor], name: str) -> list[tuple[float, float]]:
    """Mean and standard deviation (by n - 1) of each column; NaN where there is no value."""
    columns = zip(*(sums[f"{name}.{x}"].tolist() for x in ("count", "sum", "squares")), strict=True)
    found = []
    for n, total, squares in columns:
        mean = total / n if n else math.nan
        variance = (squares - n * mean * mean) / (n - 1) if n > 1 else math.nan
        found.append((mean, math.sqrt(max(0.0, variance)) if n > 1 else math.nan))
    return found


def _correlation(sums: Mapping[str, torch.Tensor]) -> float:
    """Pearson's, of rewards and lengths of all completions; NaN where one of them is constant."""
    n = float(sums["reward.count"].sum())
    if n < 2:
        return math.nan
    reward, length = float(sums["reward.sum"].sum()) / n, float(sums["reward.lengths"]) / n
    both = float(sums["reward.length"]) / n - reward * length
    spread = (float(sums["reward.squares"].sum()) / n - reward**2) * (
        float(sums["length.squares"]) / n - length**2
    )
    return both / math.sqrt(spread) if spread > 1e-12 else math.nan
