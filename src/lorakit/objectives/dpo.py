"""Direct preference optimisation: an adapter learns which of two answers is preferred.

With the log-ratio r(y) = log pi(y | x) - log pi_ref(y | x) of the chosen answer y+ and the rejected
one y-, the loss is -log sigmoid(beta (r(y+) - r(y-))) (Rafailov et al. 2023, arXiv:2305.18290).
Names, defaults and losses are those of TRL's `DPOConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log, log1p
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from lorakit.objectives.batch_sums import EACH
from lorakit.objectives.forward import per_sequence, supervised_per_sequence
from lorakit.objectives.objective import Batch
from lorakit.objectives.optimal_transport import aot, aot_unpaired
from lorakit.objectives.preference import Pairs, PreferencePairs
from lorakit.objectives.settings import Settings

if TYPE_CHECKING:
    import torch

    from lorakit.data.masking import TokenizedRow
    from lorakit.objectives.forward import Forward

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

_DISCOPOP_TURNS = (1 - log(2)) / 3
"""The temperature below which the slope of `discopop` is positive at a margin of 0: there it is
(1 - log 2) / (4 tau) - 3/4."""

_LARGEST_EXPONENT = 80.0  # as TRL: exp of more is no float32


class DpoSettings(Settings):
    """TRL's settings of DPO.

    Attributes:
        beta: how strongly the adapter is kept near the reference; tau in the IPO paper.
        loss_type: one of `LOSSES`, or several, whose losses are added (MPO).
        loss_weights: a weight for each of several losses; None is 1 for each.
        label_smoothing: the share of labels that are taken to be wrong (`robust`, `aot`,
            `aot_unpaired`), or epsilon (`exo_pair`).
        f_divergence_type: by which f-divergence the adapter is kept near the reference, for losses
            of the difference of both rewards (`OF_DIFFERENCES`; Wang et al. 2023,
            arXiv:2309.16240): `reverse_kl` is DPO's own.
        f_alpha_divergence_coef: alpha of `alpha_divergence`; 1 is the reverse KL.
        discopop_tau: temperature of `discopop`.
        ld_alpha: what tokens count that are behind the length of the shorter answer, from 0 to 1
            (LD-DPO, Liu et al. 2024, arXiv:2409.06411); None for as much as others.
        use_weighting: each pair's loss counts as much as both answers are likely to be the
            policy's own (WPO, Zhou et al. 2024, arXiv:2406.11827, equation 2).
        precompute_ref_log_probs: compute the reference before the first step (again where a run
            is resumed) instead of in each; None where rows are seen more than once.
    """

    beta: float = Field(0.1, gt=0)
    loss_type: str | list[str] = "sigmoid"
    loss_weights: list[float] | None = None
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    ld_alpha: float | None = Field(None, ge=0, le=1)
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = Field(0.05, gt=0)
    use_weighting: bool = False
    precompute_ref_log_probs: bool | None = None

    @field_validator("loss_type")
    @classmethod
    def _known(cls, value: str | list[str]) -> str | list[str]:
        given = [value] if isinstance(value, str) else value
        if not given or len(set(given)) < len(given) or set(given) - LOSSES.keys():
            hints = "".join(_FORMER[name] for name in given if name in _FORMER)
            names = ", ".join(LOSSES)
            raise ValueError(f"{hints}should be one of {names}, or a list of some of them")
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
        if self.label_smoothing and not _SMOOTHED & set(given):
            raise ValueError(
                f"label_smoothing has an effect with loss_type {', '.join(sorted(_SMOOTHED))} alone"
            )
        if self.f_divergence_type != "reverse_kl" and (others := set(given) - OF_DIFFERENCES):
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type} has no meaning with loss_type "
                f"{', '.join(sorted(others))}: it is for {', '.join(sorted(OF_DIFFERENCES))}"
            )
        if self.f_divergence_type != "alpha_divergence":
            self._only_by_default("f_alpha_divergence_coef", "f_divergence_type=alpha_divergence")
        if self.use_weighting and (sorting := SORTING & set(given)):
            raise ValueError(
                f"use_weighting weighs pairs, and loss_type {sorted(sorting)[0]} compares answers "
                "of different pairs: leave one of them out"
            )
        if "discopop" not in given:
            self._only_by_default("discopop_tau", "loss_type discopop")
        if "exo_pair" in given and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0, such as 0.001")
        return self

    def _only_by_default(self, name: str, needs: str) -> None:
        if getattr(self, name) != type(self).model_fields[name].default:
            raise ValueError(f"{name} has an effect with {needs} alone")


class Dpo(PreferencePairs):
    """DPO and the losses that TRL's trainer has beside it."""

    name = "dpo"
    Settings = DpoSettings
    constant_settings = ("ld_alpha",)
    cure_of_falling = (
        "Add the cross-entropy of chosen answers (objective.loss_type=[sigmoid,sft], TRL's former "
        "rpo_alpha), lower training.learning_rate, or raise objective.beta."
    )

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.shares_passes = not self.settings.use_weighting

    def with_settings(self, settings: Any) -> Self:
        """As in `PreferencePairs`; weights need more than the losses of tokens."""
        other = super().with_settings(settings)
        other.shares_passes = not settings.use_weighting
        return other

    def of_policy(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in `PreferencePairs`; with `use_weighting` a pair's weight is w(y+) w(y-).

        log w(y) is the mean over the tokens t of log p(t) - log sum_v p(v)^2.
        """
        if not self.settings.use_weighting:
            return super().of_policy(forward, batch)
        tokens, collisions = forward.with_collisions(batch)
        lengths = supervised_per_sequence(batch)
        means = per_sequence(tokens.detach() - collisions, lengths) / lengths
        return tokens, means.view(-1, 2).sum(1).exp()

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

    def notices(self, rows: Sequence[TokenizedRow]) -> list[str]:
        """Where the gradient of `discopop` goes against the preference at the reference."""
        found, settings = super().notices(rows), self.settings
        if "discopop" in settings.losses and settings.discopop_tau < _DISCOPOP_TURNS:
            found.append(
                f"discopop with discopop_tau={settings.discopop_tau:g} is not monotonic: where the "
                "adapter equals its reference, its gradient favours the rejected answer. Start "
                "from an adapter that prefers the chosen ones already, or raise discopop_tau above "
                f"{_DISCOPOP_TURNS:.2f}"
            )
        return found

    @property
    def needs_all_batches(self) -> bool:
        """Whether a loss sorts all pairs of a step."""
        return not SORTING.isdisjoint(self.settings.losses)

    def beforehand(self, forward: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        """The log-probabilities of each pair, for losses that sort them."""
        pairs = super().pairs(forward, batch)
        return {f"{EACH}policy": pairs.policy, f"{EACH}reference": pairs.reference}

    def read_beforehand(self, batch: Batch) -> Batch | None:
        """The pairs themselves."""
        return batch if self.needs_all_batches else None

    def pairs(self, forward: Forward, batch: Batch) -> Pairs:
        """As in `PreferencePairs`, with those of the whole step where they are known."""
        found = super().pairs(forward, batch)
        policy, reference = (batch.get(f"step.{EACH}{name}") for name in ("policy", "reference"))
        if policy is None or reference is None:
            return found
        step = Pairs(policy.to(found.policy), reference.to(found.policy), found.lengths)
        return replace(found, step=step)

    def pair_losses(self, pairs: Pairs) -> torch.Tensor:
        """The weighted sum of the losses in `loss_type`."""
        weighted = (
            w * LOSSES[name](pairs, self.settings) for name, w in self.settings.losses.items()
        )
        first = next(weighted)
        total = sum(weighted, first)
        return total if pairs.weights is None else pairs.weights * total


# --- the losses of pairs --------------------------------------------------------------------------


def _logsigmoid(x: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def _margin(log_ratios: torch.Tensor) -> torch.Tensor:
    return log_ratios[:, 0] - log_ratios[:, 1]


def _scores(pairs: Pairs, settings: Any) -> torch.Tensor:
    """f'(t) of the f-divergence at the probability ratios t = exp(r), but for a constant.

    log t for the reverse KL, 1 - 1/t for the forward KL, log(2 t / (1 + t)) for Jensen-Shannon,
    (t^(alpha - 1) - 1) / (alpha - 1) for alpha (Wang et al. 2023, arXiv:2309.16240, table 1).
    """
    r, kind = pairs.log_ratios, settings.f_divergence_type
    if kind == "forward_kl":
        return 1 - (-r).exp()
    if kind == "js_divergence":
        return log(2) + _logsigmoid(r)
    power = settings.f_alpha_divergence_coef - 1
    if kind == "reverse_kl" or abs(power) < 1e-6:
        return r
    scores: torch.Tensor = ((power * r).clamp(max=_LARGEST_EXPONENT).exp() - 1) / power
    return scores


def sigmoid(pairs: Pairs, settings: Any) -> torch.Tensor:
    """-log sigmoid(beta (r+ - r-)), equation 7 of the DPO paper."""
    return -_logsigmoid(settings.beta * _margin(_scores(pairs, settings)))


def sigmoid_norm(pairs: Pairs, settings: Any) -> torch.Tensor:
    """As `sigmoid`, with log-ratios per token (Lambert et al. 2024, arXiv:2411.15124)."""
    return -_logsigmoid(settings.beta * _margin(_scores(pairs, settings) / pairs.lengths))


def hinge(pairs: Pairs, settings: Any) -> torch.Tensor:
    """max(0, 1 - beta (r+ - r-)) (Zhao et al. 2023, arXiv:2305.10425)."""
    return (1 - settings.beta * _margin(_scores(pairs, settings))).relu()


def ipo(pairs: Pairs, settings: Any) -> torch.Tensor:
    """(r+ - r- - 1 / (2 beta))^2 with log-ratios per token (Azar et al. 2023, arXiv:2310.12036)."""
    margin = _margin(_scores(pairs, settings) / pairs.lengths)
    return (margin - 1 / (2 * settings.beta)).square()


def robust(pairs: Pairs, settings: Any) -> torch.Tensor:
    """Unbiased where a share of the labels is wrong (Chowdhury et al. 2024, arXiv:2403.00409)."""
    margin = settings.beta * _margin(_scores(pairs, settings))
    wrong = settings.label_smoothing
    return (wrong * _logsigmoid(-margin) - (1 - wrong) * _logsigmoid(margin)) / (1 - 2 * wrong)


def exo_pair(pairs: Pairs, settings: Any) -> torch.Tensor:
    """KL of the policy's preference from the labels' (Ji et al. 2024, arXiv:2402.00856, eq. 16)."""
    margin = settings.beta * _margin(_scores(pairs, settings))
    wrong = settings.label_smoothing
    better = margin.sigmoid() * (_logsigmoid(margin) - log1p(-wrong))
    return better + (-margin).sigmoid() * (_logsigmoid(-margin) - log(wrong))


def discopop(pairs: Pairs, settings: Any) -> torch.Tensor:
    """Logistic loss of small margins, exponential loss of large ones, blended by their sigmoid.

    Found by a language model (Lu et al. 2024, arXiv:2406.08414, equation 5).
    """
    margin = settings.beta * _margin(_scores(pairs, settings))
    large = (margin / settings.discopop_tau).sigmoid()
    return -_logsigmoid(margin) * (1 - large) + (-margin).exp() * large


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
        *(sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, discopop),
        *(nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, aot, aot_unpaired, sft),
    )
}
"""TRL's names of the losses of a pair."""

_PLAIN = (sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, discopop, sft)
OF_DIFFERENCES = {one.__name__ for one in _PLAIN}
"""Those for which `f_divergence_type` is defined: what it leaves open is the same for both answers.
`sft` may stand beside them."""

SORTING = {"aot", "aot_unpaired"}
"""Those that need all pairs of an optimizer step."""

_SMOOTHED = {"robust", "exo_pair", *SORTING}

_FORMER = {
    "kto_pair": "kto_pair is objective: kto, which takes pairs too; ",
    "aot_pair": "aot_pair is aot_unpaired; ",
}
"""What TRL's earlier names have become."""
