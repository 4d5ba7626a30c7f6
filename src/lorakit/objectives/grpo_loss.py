"""The loss of a batch of sampled completions, out of the parts in `policy_gradient.py`.

The policy's loss of each token, what leaves tokens out or weighs them, the KL divergence from the
reference, and the entropy bonus; in TRL's order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.objectives import grpo_metrics, policy_gradient
from lorakit.objectives.batch_sums import EACH
from lorakit.objectives.completion_rows import PREFIX
from lorakit.objectives.forward import BASE, Forward
from lorakit.objectives.rollout import REFERENCE

if TYPE_CHECKING:
    import torch

    from lorakit.objectives.grpo_settings import GrpoSettings
    from lorakit.objectives.objective import Batch


def policy_loss(
    forward: Forward, batch: Batch, settings: GrpoSettings, reference: str | None, count: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss of a batch of completions, a scalar, and sums over its tokens.

    Args:
        batch: as `completion_rows.group_tensors` describes completions; with the sums of the whole
            step (`Grpo.beforehand`) where the loss has to do with entropies.
        reference: what the KL divergence is from; None is the base.
        count: what the loss is divided by, of this batch.
    """
    import torch

    kind = policy_gradient.LOSSES[settings.loss_type]
    log_probs, entropies = forward.with_entropies(batch, learned=bool(settings.entropy_coef))
    lengths = batch[PREFIX + "lengths"]
    sampled = batch[PREFIX + "logprobs"].to(log_probs)
    now, is_now = log_probs.detach(), batch[PREFIX + "fresh"].repeat_interleave(lengths)
    c = policy_gradient.Completions(
        log_probs,
        # Of the weights that sampled, rounding apart: their ratio is 1, as in TRL.
        torch.where(is_now, now, sampled),
        lengths,
        batch[PREFIX + "advantages"].to(log_probs),
        settings.level,
    )
    losses = kind.of_tokens(c, settings)
    if settings.off_policy_mask_threshold is not None:
        losses = losses * policy_gradient.near_enough(c, settings.off_policy_mask_threshold)
    of_step = batch.get(f"step.{EACH}entropies", entropies).detach()
    share = settings.top_entropy_quantile
    uncertain = policy_gradient.most_uncertain(entropies.detach(), of_step, share)
    losses = losses * uncertain
    if (most := settings.clip_max) is not None:
        losses = losses * policy_gradient.truncated_ratio(now, sampled, most)
    kl = None
    if settings.beta:
        known = batch.get(REFERENCE)
        if known is None:
            known = forward.of_reference(batch, reference or BASE)
        kl = policy_gradient.kl(c, known, settings.use_bias_correction_kl)
        losses = losses + settings.beta * kl
    gap = (now - sampled)[is_now].abs()
    metrics = grpo_metrics.of_tokens(c, entropies.detach(), kl, gap, settings)
    total = kind.normalisation.total(losses, c)
    if settings.entropy_coef:  # a mean over tokens, whatever the policy's loss is divided by
        tokens = policy_gradient.most_uncertain(of_step, of_step, share).sum()
        tokens = batch.get("step.tokens", tokens).to(total)
        scale = torch.as_tensor(batch.get("step.count", count)).to(total) / tokens.clamp(min=1)
        total = total - settings.entropy_coef * scale * (entropies * uncertain).sum()
    return total, metrics
