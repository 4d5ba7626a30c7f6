"""KTO: answers that are desirable or not become likelier or less likely, each by itself.

With r = log pi(y | x) - log pi_ref(y | x) and a reference point z0 the loss of a desirable answer
is w_D (1 - sigmoid(beta (r - z0))), that of an undesirable one w_U (1 - sigmoid(beta (z0 - r)))
(Ethayarajh et al. 2024, arXiv:2402.01306, equation 7). z0 estimates KL(pi || pi_ref): the mean
log-ratio of answers behind the prompts of others, at least 0, without gradients.

TRL pairs a prompt with the answer of the row before it in the batch, and takes z0 of each batch
and process by itself, so that the loss depends on how a step is divided. Here a row keeps its
mismatched answer, that of the row before it in the data with another prompt, and z0 is the mean
over all rows of an optimizer step, over accumulated batches and processes: in one batch of all rows
in the order of the data it is TRL's. Of held-out rows it is the mean over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lorakit.data.batches import taken_from, under
from lorakit.data.preference_tokens import JudgedRow, tokenize_judged, with_mismatched
from lorakit.objectives.batch_sums import Loss
from lorakit.objectives.forward import BASE, Forward, per_sequence, supervised_per_sequence
from lorakit.objectives.objective import Batch, Collate, Objective
from lorakit.objectives.preference import (
    CURE,
    EPOCHS,
    LEARNING_RATES,
    LOWER_IS_BETTER,
    SAMPLE_TOKENS,
    SCORES,
    both_fall,
    unread_margins,
)
from lorakit.objectives.settings import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.masking import TokenizedRow

_MISMATCHED = "mismatched."


class KtoSettings(Settings):
    """TRL's settings of KTO.

    Attributes:
        beta: how strongly the adapter is kept near the reference.
        loss_type: `kto`, or `apo_zero_unpaired`, which has no z0 (arXiv:2408.06266).
        desirable_weight, undesirable_weight: what a row of either kind counts.
        precompute_ref_log_probs: as in `dpo`.
    """

    beta: float = Field(0.1, gt=0)
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)
    precompute_ref_log_probs: bool | None = None


class Kto(Objective):
    """Kahneman-Tversky optimisation.

    Attributes:
        reference: as in `PreferencePairs`.
    """

    name = "kto"
    unit = "answer"
    row_kinds = ("unpaired_preference", "preference")
    smooths_labels = False
    learning_rates: ClassVar[Mapping[str, float]] = LEARNING_RATES
    epochs: ClassVar[Sequence[tuple[int, int]]] = EPOCHS
    shown_metrics: ClassVar[Sequence[str]] = ("accuracy", "margin")
    Settings = KtoSettings

    score_names = (*SCORES, "kl")
    lower_is_better = (*LOWER_IS_BETTER, "kl")
    sample_tokens = SAMPLE_TOKENS
    reference: str = BASE
    shares_passes = True

    # --- rows to batches --------------------------------------------------------------------

    def tokenize(
        self, sample: Any, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> TokenizedRow:
        """A judged answer; both answers of a pair, one desirable and one not."""
        return tokenize_judged(sample, tokenizer, max_length)

    def together(self, rows: Sequence[TokenizedRow], max_length: int) -> Sequence[TokenizedRow]:
        """Gives each answer's prompt a mismatched answer."""
        return with_mismatched(rows, max_length)

    def notices(self, rows: Sequence[TokenizedRow]) -> list[str]:
        """What to say of rows whose kinds have very different weights in the loss.

        The paper's equation 8 has w_D n_D / (w_U n_U) between 1 and 4/3.
        """
        unread = unread_margins(rows, self.name)
        labels = [part.desirable for row in rows for part in row.sequences]  # type: ignore[attr-defined]
        good = sum(labels)
        bad, count = len(labels) - good, f"{len(labels):,} answers"
        if not good or not bad:
            only = "desirable" if good else "undesirable"
            return [
                *unread,
                f"all {count} are {only}: KTO learns from the contrast of both kinds; add rows of "
                "the other, or learn desirable answers with objective: sft",
            ]
        weight = self.settings.desirable_weight / self.settings.undesirable_weight
        if 1 <= round(weight * good / bad, 2) <= 1.34:
            return unread
        return [
            *unread,
            f"{good:,} of {count} are desirable: KTO's paper has desirable_weight x desirable rows "
            "between 1 and 4/3 of undesirable_weight x undesirable rows, e.g. "
            + (
                f"objective.desirable_weight={7 / 6 * bad / good:.2g}"  # in the middle
                if good < bad
                else f"objective.undesirable_weight={6 / 7 * good / bad:.2g}"
            ),
        ]

    def to_batch(self, rows: Sequence[TokenizedRow], collate: Collate) -> dict[str, torch.Tensor]:
        """The answers with their labels, and the mismatched ones as a batch beside them."""
        import torch

        parts = [part for row in rows for part in row.sequences if isinstance(part, JudgedRow)]
        batch = super().to_batch(rows, collate)
        batch["sequence.desirable"] = torch.tensor([part.desirable for part in parts])
        others = collate([part.mismatched for part in parts if part.mismatched is not None])
        return batch | under(_MISMATCHED, others)

    # --- loss and scores --------------------------------------------------------------------

    def count(self, batch: Batch) -> int:
        """The answers."""
        return len(batch["sequence.desirable"])

    has_constants = True

    def computes_constants(self, epochs: float) -> bool:
        """As of `PreferencePairs`."""
        wanted: bool | None = self.settings.precompute_ref_log_probs
        return epochs > 1 if wanted is None else wanted

    def row_constants(self, forward: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        """The reference's log-probabilities of the answers and of the mismatched ones."""
        parts = {"reference": batch, "mismatched": taken_from(batch, _MISMATCHED)}
        return {name: self._of_reference(forward, part) for name, part in parts.items()}

    def _of_reference(self, forward: Forward, batch: Batch) -> torch.Tensor:
        tokens = forward.of_reference(batch, self.reference)
        return per_sequence(tokens, supervised_per_sequence(batch))

    def beforehand(self, forward: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        """The summed log-ratios of mismatched answers, and their number."""
        import torch

        if self.settings.loss_type != "kto":
            return {}
        if self.reference == BASE and forward.is_base:  # z0 is 0
            return {"kl": torch.zeros(()), "answers": torch.ones(())}
        known = batch.get("sequence.mismatched")
        ratios = self._log_ratios(forward, taken_from(batch, _MISMATCHED), known)[1]
        return {"kl": ratios.sum(), "answers": ratios.new_tensor(len(ratios))}

    def read_beforehand(self, batch: Batch) -> Batch | None:
        """The mismatched answers."""
        return taken_from(batch, _MISMATCHED) if self.settings.loss_type == "kto" else None

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The summed loss of the answers, with the rewards that it implies."""
        import torch

        settings, desirable = self.settings, batch["sequence.desirable"]
        policy, ratios = self._log_ratios(forward, batch, batch.get("sequence.reference"))
        z0 = ratios.new_zeros(())
        if "step.kl" in batch:
            z0 = (batch["step.kl"] / batch["step.answers"]).clamp(min=0).to(ratios)
        sign = desirable.to(ratios) * 2 - 1
        losses = 1 - (settings.beta * sign * (ratios - z0)).sigmoid()
        weights = torch.where(desirable, settings.desirable_weight, settings.undesirable_weight)
        rewards = settings.beta * ratios.detach()
        metrics = {"desirable": desirable.sum(), "kl": z0.detach() * len(ratios)}
        for name, chosen in (("chosen", desirable), ("rejected", ~desirable)):
            metrics[f"rewards/{name}"] = rewards[chosen].sum()
            metrics[f"logps/{name}"] = policy.detach()[chosen].sum()
        margins = sign * (rewards - settings.beta * z0.detach())
        metrics["accuracy"] = (margins > 0).to(ratios).sum() + (margins == 0).to(ratios).sum() / 2
        return Loss((weights.to(losses) * losses).sum(), self.count(batch), metrics)

    def _log_ratios(
        self, forward: Forward, batch: Batch, known: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """log pi and log pi - log pi_ref of each answer (answers,); without gradients of pi_ref.

        Args:
            known: log pi_ref, where it has been computed before.
        """
        [policy] = forward.log_probabilities(batch)
        if self.reference == BASE and forward.is_base:
            reference = policy.detach()
        elif known is not None:
            reference = known.to(policy)
        else:
            reference = self._of_reference(forward, batch)
        return policy, policy - reference

    def scores(self, sums: Mapping[str, torch.Tensor], count: float) -> dict[str, float]:
        """Means over the answers of either kind; a kind without rows has no score.

        `accuracy` is the share of answers on the right side of z0, `margin` the distance of the
        mean rewards of both kinds, `kl` the estimate z0.
        """
        good = float(sums["desirable"])
        found = {"accuracy": float(sums["accuracy"]) / count, "kl": float(sums["kl"]) / count}
        for name, number in (("chosen", good), ("rejected", count - good)):
            for what in ("rewards", "logps"):
                key = f"{what}/{name}"
                found[key] = float(sums[key]) / number if number else 0.0
        found["margin"] = found["rewards/chosen"] - found["rewards/rejected"]
        return {name: found[name] for name in self.score_names}

    def warnings(self, logs: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
        """That desirable and undesirable answers both become less likely."""
        yield from both_fall(logs, {}, CURE, self.settings.beta)
