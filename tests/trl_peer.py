"""What comparisons of losses and gradients with TRL's trainers have in common."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorakit.lora import LoraModel
from lorakit.objectives.batch_sums import added, with_sums
from lorakit.objectives.objective import Objective
from tiny import CHATML

Gradients = dict[str, torch.Tensor]
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "task_type": "CAUSAL_LM",
}
TEMPLATE = CHATML.replace("<|im_end|>\n", "<|im_end|>")  # TRL learns what stands behind the end


class ExactHead:
    """In place of TRL's fused log-probabilities of labels: the same in the precision of `h`."""

    @staticmethod
    def apply(
        h: Any, weight: Any, bias: Any, labels: Any, temperature: float = 1.0, *_: Any
    ) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(h, weight, bias) / temperature
        logs = logits.log_softmax(-1)
        log_probs = logs.gather(-1, labels[:, None]).squeeze(-1)
        zero = torch.zeros_like(log_probs.detach())
        squares = logits.detach().softmax(-1).square().sum(-1).log()
        entropies = -(logs.exp() * logs).sum(-1)
        return log_probs, entropies, squares, zero, zero.bool()


def exact_norm(self: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """In place of transformers' norm, which rounds to float32."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (x * scale)


@contextmanager
def in_float64() -> Iterator[pytest.MonkeyPatch]:
    """Within the block model and TRL compute in float64 throughout."""
    from trl.trainer import utils

    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", ExactHead)
        patch.setattr(LlamaRMSNorm, "forward", exact_norm)
        torch.set_default_dtype(torch.float64)
        yield patch
    torch.set_default_dtype(before)


def loss_of_trl(trainer: Any, batch: dict[str, Any]) -> tuple[float, Gradients]:
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), found


def loss_of_lorakit(
    model: LoraModel, objective: Objective, batches: Sequence[dict[str, torch.Tensor]]
) -> tuple[float, Gradients]:
    """The mean loss over all batches, as in an optimizer step, and its gradients."""
    forward = objective.forward(model)
    model.zero_grad()
    before: dict[str, torch.Tensor] = {}
    if objective.needs_all_batches:
        with torch.no_grad():
            for batch in batches:
                found = objective.beforehand(forward, batch)
                before = added(before, found)
    losses = [objective.loss(forward, with_sums(batch, before)) for batch in batches]
    count = sum(int(loss.count) for loss in losses)
    total = torch.stack([loss.total for loss in losses]).sum() / count
    total.backward()
    return total.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def assert_same(ours: tuple[float, Gradients], theirs: tuple[float, Gradients]) -> None:
    assert ours[0] == pytest.approx(theirs[0], abs=1e-9)
    assert ours[1].keys() == theirs[1].keys()
    assert any(gradient.abs().max() > 1e-6 for gradient in ours[1].values())
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).abs().max() < 1e-9, name
