"""What objectives over preference pairs have in common: rows, log-probabilities, rewards, scores.

A subclass says what a pair costs (`pair_losses`). Where it has a reference, that is another route
through the same weights (`BASE`, the model without its adapter), so that no second model is loaded.
Its rows need no gradients: in the policy's own pass they would cost a backward pass for nothing, so
that they have a pass of their own, in each step, or once where rows are seen more than once. Of
the bundled model in bfloat16 four pairs took 11.3 s of one core in the same pass, 9.5 s with a pass
of their own, and 6.3 s in each epoch behind 2.6 s once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lorakit.data.preference_tokens import tokenize_pair
from lorakit.objectives.batch_sums import Loss
from lorakit.objectives.forward import BASE, Forward, per_sequence, supervised_per_sequence
from lorakit.objectives.objective import Batch, Objective

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.masking import TokenizedRow

SCORES = (
    "accuracy",
    "margin",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)
"""TRL's `rewards/accuracies`, `rewards/margins` and so on. Of equal rewards, as before the first
step, half count as right, so that chance has an accuracy of 0.5; with TRL it is 0."""

LOWER_IS_BETTER = ("rewards/rejected", "logps/rejected")

SAMPLE_TOKENS = 256
"""Long enough to see whether answers become longer, as they do where data has a length bias."""

LEARNING_RATES = {"small": 5e-5, "medium": 1e-5, "large": 5e-6}
"""By the size of the model. Tens of times below those of supervised fine-tuning: TRL's examples and
LLaMA-Factory's have 5e-6 for DPO and KTO with LoRA on models of 7B (alignment-handbook's
zephyr-7b-dpo-qlora too), and small models take larger ones."""


EPOCHS = ((1_000, 3), (10_000, 2))
"""Fewer than for answers: DPO overfits from the second pass on (Tunstall et al. 2023,
arXiv:2310.16944, who train for one to three)."""


@dataclass(frozen=True)
class Pairs:
    """What a batch's pairs are judged by; each tensor is (pairs, 2), the chosen answer first.

    Args:
        policy: log-probabilities of the answers under the adapter in training, in nats.
        reference: the same of the reference, without gradients; zeros where there is none.
        lengths: supervised tokens of the answers.
        step: all pairs of the optimizer step, or all held-out ones, without gradients, for losses
            that compare a pair with others; None for these pairs alone.
        weights: what each pair's loss counts (pairs,), without gradients; None for 1.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    lengths: torch.Tensor
    step: Pairs | None = None
    weights: torch.Tensor | None = None

    @property
    def log_ratios(self) -> torch.Tensor:
        """How much likelier an answer is than under the reference: log pi - log pi_ref."""
        return self.policy - self.reference

    @property
    def mean_policy(self) -> torch.Tensor:
        """The log-probabilities per token."""
        return self.policy / self.lengths


CURE = "Lower training.learning_rate or raise objective.beta."

FALLEN = 0.05
"""The warning's threshold: answers have become less likely where their log-probability has fallen
by more than this share of its first value, and by at least one nat."""


def both_fall(
    logs: Mapping[str, float], first: dict[str, float], cure: str, beta: float | None
) -> Iterator[tuple[str, str, str]]:
    """A warning when chosen and rejected answers have both become less likely.

    The known failure of losses that look at the margin alone: it grows while probability moves to
    answers that nobody has judged (Pal et al. 2024, arXiv:2402.13228; Razin et al. 2024,
    arXiv:2410.08847).

    Args:
        logs: as `Objective.warnings` has them.
        first: the first held-out log-probabilities of the run, which are kept here: those of now
            are compared with them where there is no reference.
        cure: what to do.
        beta: a reward is beta times what an answer has gained on the reference, in nats; None
            where there is no reference.
    """
    for prefix, rows in (("", "training"), ("eval_", "held-out")):
        gains: list[float] = []
        now = 0.0
        for kind in ("rejected", "chosen"):
            if (key := f"{prefix}logps/{kind}") not in logs:
                break
            now = logs[key]
            if beta is not None:
                gains.append(logs[f"{prefix}rewards/{kind}"] / beta)
            elif prefix:  # rows of other steps are other rows
                gains.append(now - first.setdefault(key, now))
        if len(gains) < 2:
            continue
        rejected, chosen = gains
        if rejected < 0 and chosen < -max(1.0, FALLEN * abs(now - chosen)):
            yield (
                "chosen answers become less likely",
                f"chosen answers of {rows} rows have become less likely, by {-chosen:.1f} nats "
                f"each, and rejected ones by {-rejected:.1f}: the margin grows as both go down",
                cure,
            )
            return


def unread_margins(rows: Sequence[TokenizedRow], name: str) -> list[str]:
    """A notice of rows with a `margin`, which the objective `name` does not read."""
    count = sum(getattr(row, "margin", None) is not None for row in rows)
    if not count:
        return []
    return [f"'margin' of {count:,} rows is not used by {name}: objective reward learns by it"]


class PreferencePairs(Objective):
    """Pairs of a chosen and a rejected answer.

    Attributes:
        reference: the adapter that the policy is compared with, `BASE` for none of them; None for
            an objective without reference.
        cure_of_falling: what to do where both kinds of answers become less likely.
    """

    unit = "pair"
    row_kinds = ("preference",)
    smooths_labels = False
    learning_rates: ClassVar[Mapping[str, float]] = LEARNING_RATES
    epochs: ClassVar[Sequence[tuple[int, int]]] = EPOCHS
    shown_metrics: ClassVar[Sequence[str]] = ("accuracy", "margin")

    score_names = SCORES
    sample_tokens = SAMPLE_TOKENS
    lower_is_better = LOWER_IS_BETTER
    reference: str | None = BASE
    shares_passes = True
    cure_of_falling: ClassVar[str] = CURE

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._first: dict[str, float] = {}

    def tokenize(
        self, sample: Any, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> TokenizedRow:
        """Both answers behind the same prompt; see `data.preference_tokens`."""
        return tokenize_pair(sample, tokenizer, max_length)

    def with_settings(self, settings: Any) -> Self:
        """As `Objective.with_settings`; a run of its own remembers nothing of others."""
        other = super().with_settings(settings)
        other._first = {}
        return other

    def notices(self, rows: Sequence[TokenizedRow]) -> list[str]:
        """That margins of rows are not used."""
        return unread_margins(rows, self.name)

    def count(self, batch: Batch) -> int:
        """The pairs."""
        return len(supervised_per_sequence(batch)) // 2

    @property
    def has_constants(self) -> bool:
        """Whether there is a reference."""
        return self.reference is not None

    def computes_constants(self, epochs: float) -> bool:
        """Whether the reference's log-probabilities are computed once: as the recipe says, or
        where a row is seen more than once.
        """
        wanted: bool | None = getattr(self.settings, "precompute_ref_log_probs", None)
        return self.has_constants and (epochs > 1 if wanted is None else wanted)

    def row_constants(self, forward: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        """The reference's log-probabilities."""
        return {"reference": self._of_reference(forward, batch).flatten()}

    def pairs(self, forward: Forward, batch: Batch) -> Pairs:
        """The log-probabilities of a batch's pairs, those of the reference without gradients."""
        import torch

        lengths = supervised_per_sequence(batch)
        tokens, weights = self.of_policy(forward, batch)
        policy = self.of_answers(tokens, lengths)
        if self.reference is None:
            reference = torch.zeros_like(policy)
        elif self.reference == BASE and forward.is_base:
            reference = policy.detach()
        elif (known := batch.get("sequence.reference")) is not None:
            reference = known.to(policy).view(-1, 2)
        else:
            reference = self._of_reference(forward, batch)
        return Pairs(policy, reference, lengths.view(-1, 2), weights=weights)

    def of_policy(self, forward: Forward, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The policy's log-probabilities of a batch's tokens (n,), and `Pairs.weights`."""
        return forward.token_log_probabilities(batch)[0], None

    def _of_reference(self, forward: Forward, batch: Batch) -> torch.Tensor:
        assert self.reference is not None
        tokens = forward.of_reference(batch, self.reference)
        return self.of_answers(tokens, supervised_per_sequence(batch))

    def of_answers(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The log-probabilities of answers (pairs, 2): the sums of those of their tokens (n,).

        Args:
            lengths: of each answer, (2 * pairs,).
        """
        return per_sequence(tokens, lengths).view(-1, 2)

    def pair_losses(self, pairs: Pairs) -> torch.Tensor:
        """The loss of each pair (pairs,)."""
        raise NotImplementedError(f"{type(self).__name__} has no loss of a pair")

    def rewards(self, pairs: Pairs) -> torch.Tensor:
        """What each answer is taken to be worth (pairs, 2): beta times its log-ratio."""
        rewards: torch.Tensor = self.settings.beta * pairs.log_ratios
        return rewards

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The summed loss of the pairs, with the rewards that it implies."""
        pairs = self.pairs(forward, batch)
        total = self.pair_losses(pairs).sum()
        rewards, policy = self.rewards(pairs).detach(), pairs.policy.detach()
        margins = rewards[:, 0] - rewards[:, 1]
        right = (margins > 0).to(rewards) + (margins == 0).to(rewards) / 2
        values = (
            right.sum(),
            margins.sum(),
            *rewards.sum(0),
            *policy.sum(0),
        )
        return Loss(total, self.count(batch), dict(zip(SCORES, values, strict=True)))

    def warnings(self, logs: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
        """That chosen and rejected answers both become less likely."""
        beta = None if self.reference is None else self.settings.beta
        yield from both_fall(logs, self._first, self.cure_of_falling, beta)
