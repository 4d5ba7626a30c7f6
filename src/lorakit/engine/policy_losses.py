"""Policy-gradient losses of a row's tokens, summed: importance sampling, PPO, CISPO, DRO, GSPO.

Each takes log-probabilities lp (n,) of the learned tokens under the policy that is trained, and of
the row's inputs `logprobs` q, those under the policy that sampled, and `advantages` A. With the
ratio r = exp(lp − q) the losses are sums over the tokens, never means. Which settings a loss has,
and what they are by default, is in `POLICY_LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from lorakit.engine.token_losses import AdapterRow, TokenLoss, cross_entropy
from lorakit.errors import InputError, did_you_mean, listed

LOW, HIGH = "clip_low_threshold", "clip_high_threshold"

Settings = Mapping[str, float]


def importance_sampling(lp: torch.Tensor, row: AdapterRow, settings: Settings) -> torch.Tensor:
    """−Σ r · A: the policy gradient, corrected for another policy having sampled."""
    q, advantages = _sampled(lp, row)
    return -((lp - q).exp() * advantages).sum()


def ppo(lp: torch.Tensor, row: AdapterRow, settings: Settings) -> torch.Tensor:
    """−Σ min(r · A, clip(r, low, high) · A) (Schulman et al. 2017, arXiv:1707.06347, eq. 7)."""
    q, advantages = _sampled(lp, row)
    return _clipped((lp - q).exp(), advantages, *_bounds(lp, row, settings))


def cispo(lp: torch.Tensor, row: AdapterRow, settings: Settings) -> torch.Tensor:
    """−Σ sg(clip(r, low, high)) · lp · A, sg without a gradient (MiniMax-M1, arXiv:2506.13585)."""
    q, advantages = _sampled(lp, row)
    low, high = _bounds(lp, row, settings)
    weights = (lp.detach() - q).exp().clamp(low, high)
    return -(weights * lp * advantages).sum()


def dro(lp: torch.Tensor, row: AdapterRow, settings: Settings) -> torch.Tensor:
    """−Σ (lp · A − β/2 (lp − q)²) (Richemond et al. 2024, arXiv:2405.19107)."""
    q, advantages = _sampled(lp, row)
    return -(lp * advantages - settings["beta"] / 2 * (lp - q).square()).sum()


def gspo(lp: torch.Tensor, row: AdapterRow, settings: Settings) -> torch.Tensor:
    """PPO's with the ratio of the whole sequence, exp(mean of lp − q), and each token's gradient.

    The mean is over the tokens whose `sequence_ratio_mask` is not 0, all without one (Zheng et al.
    2025, arXiv:2507.18071, eq. 14).
    """
    q, advantages = _sampled(lp, row)
    counted = torch.ones_like(q)
    if "sequence_ratio_mask" in row.inputs:
        counted = row.learned("sequence_ratio_mask", lp).ne(0).to(lp.dtype)
    mean = ((lp.detach() - q) * counted).sum() / counted.sum().clamp(min=1)
    ratio = (mean + lp - lp.detach()).exp()
    return _clipped(ratio, advantages, *_bounds(lp, row, settings))


def _sampled(lp: torch.Tensor, row: AdapterRow) -> tuple[torch.Tensor, torch.Tensor]:
    return row.learned("logprobs", lp), row.learned("advantages", lp)


def _bounds(
    lp: torch.Tensor, row: AdapterRow, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """The thresholds of each token: the row's own, or those of the settings."""
    low, high = (
        row.learned(name, lp) if name in row.inputs else lp.new_full((), settings[name])
        for name in (LOW, HIGH)
    )
    return low, high


def _clipped(
    ratio: torch.Tensor, advantages: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages).sum()


@dataclass(frozen=True)
class PolicyLoss:
    """A loss by name.

    Attributes:
        inputs: what a row must bring.
        optional: what it may bring.
        settings: their defaults; None where one must be given.
        usual: what those that must be given are in the paper.
    """

    compute: Callable[[torch.Tensor, AdapterRow, Settings], torch.Tensor]
    inputs: tuple[str, ...] = ("logprobs", "advantages")
    optional: tuple[str, ...] = ()
    settings: Mapping[str, float | None] = field(default_factory=dict)
    usual: str = ""


POLICY_LOSSES: Mapping[str, PolicyLoss] = {
    "cross_entropy": PolicyLoss(lambda lp, row, settings: cross_entropy(lp, row), (), ("weights",)),
    "importance_sampling": PolicyLoss(importance_sampling),
    "ppo": PolicyLoss(ppo, optional=(LOW, HIGH), settings={LOW: 0.8, HIGH: 1.2}),
    "cispo": PolicyLoss(cispo, optional=(LOW, HIGH), settings={LOW: 0.0, HIGH: 4.0}),
    "dro": PolicyLoss(dro, settings={"beta": None}),
    "gspo": PolicyLoss(
        gspo,
        optional=(LOW, HIGH, "sequence_ratio_mask"),
        settings={LOW: None, HIGH: None},
        usual="; the paper has 1 - 3e-4 and 1 + 4e-4",
    ),
}

_NEAREST = {
    "stable_reinforce": "its formula is not public; importance_sampling is the nearest",
    "custom": "custom losses are computed by the client: forward_backward_custom takes a function",
}


def policy_loss(name: str, settings: Mapping[str, float | str] | None = None) -> TokenLoss:
    """The loss `name` of `POLICY_LOSSES` with these settings.

    A setting without default that rows may bring is asked of them (`require_inputs`).

    Raises:
        InputError: there is no such loss or setting, or one that it needs is missing.
    """
    if name in _NEAREST:
        raise InputError(f"the loss {name} is not there: {_NEAREST[name]}")
    found = POLICY_LOSSES.get(name)
    if found is None:
        near = did_you_mean(name, [*POLICY_LOSSES])
        raise InputError(f"there is no loss {name!r}{near}; there are {listed([*POLICY_LOSSES])}")
    given = dict(settings or {})
    known = found.settings
    for key, value in given.items():
        if key not in known:
            has = listed([*known]) or "none"
            raise InputError(f"the loss {name} has no setting {key!r}; it has {has}")
        if isinstance(value, str) or not math.isfinite(value):
            raise InputError(f"{key} of the loss {name} must be a number, not {value!r}")
    values = {key: given.get(key, default) for key, default in known.items()}
    missing = [key for key, value in values.items() if value is None]
    per_row = [key for key in missing if key in found.optional]
    if missing and missing != per_row:
        raise InputError(f"the loss {name} needs {listed(missing)}: its default is not known")
    return partial(found.compute, settings=values)  # type: ignore[call-arg]


def require_inputs(name: str, row: AdapterRow, settings: Mapping[str, float | str] | None) -> None:
    """Whether a row has what the loss `name` needs, and nothing that it does not read.

    Args:
        settings: as given to `policy_loss`.

    Raises:
        InputError: it has not.
    """
    found = POLICY_LOSSES[name]
    missing = [each for each in found.inputs if each not in row.inputs]
    if missing:
        raise InputError(f"the loss {name} needs loss_fn_inputs {listed(missing)}")
    known = {key for key, default in found.settings.items() if default is not None}
    unset = [key for key in found.settings if key not in {*known, *(settings or {}), *row.inputs}]
    if unset:
        raise InputError(
            f"the loss {name} needs {listed(unset)}, whose default is not known: as loss_fn_config "
            f"or, of each token, in loss_fn_inputs{found.usual}"
        )
    unread = [each for each in row.inputs if each not in (*found.inputs, *found.optional)]
    if unread:
        raise InputError(f"the loss {name} does not read loss_fn_inputs {listed(unread)}")
