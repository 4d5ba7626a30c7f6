"""Fused norms and MLPs give the numbers of the modules that they stand in for, and then leave."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import lorakit
from lorakit.models.fused import SwiGLU, fused
from models.small import SMALL

GPT2 = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2}
GPT2 |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(24).view(2, 12)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def adapted(base: nn.Module, **options: Any) -> Any:
    torch.manual_seed(0)
    config = lorakit.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=False, **options
    )
    return lorakit.get_peft_model(base, config).train()


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize(
    ("make", "modules"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), 2 * 3 + 1),
        # Two norms more in each attention; their width is the head's.
        (lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=4)), 2 * 5 + 1),
        # Its norms add one to their weight, its MLP has another activation.
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=4)), 0),
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), 0),
    ],
    ids=["llama", "qwen3", "gemma2", "gpt2"],
)
def test_a_step_is_the_same_and_the_loss_to_the_bit(
    make: Any, modules: int, dtype: str, close: float
):
    torch.manual_seed(0)
    model = adapted(make().to(getattr(torch, dtype)))
    wanted, gradients = step(model)
    with fused(model) as count:
        found, own = step(model)
    assert count == modules
    assert torch.equal(found, wanted)
    assert own.keys() == gradients.keys()
    for name, gradient in own.items():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(gradient, gradients[name], rtol=0, atol=close * scale)


def test_afterwards_the_model_is_as_it_was():
    model = adapted(LlamaForCausalLM(LlamaConfig(**SMALL)))

    def fail() -> None:
        with fused(model):
            assert any("forward" in vars(module) for module in model.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any("forward" in vars(module) for module in model.modules())


def test_norms_that_are_trained_and_modules_that_are_watched_are_left_alone():
    model = adapted(LlamaForCausalLM(LlamaConfig(**SMALL)), modules_to_save=["model.norm"])
    layer = model.get_base_model().model.layers[0]
    layer.mlp.register_forward_hook(lambda *_: None)
    layer.input_layernorm.weight.requires_grad_(True)
    with fused(model) as count:
        assert "forward" not in vars(layer.mlp)
        assert "forward" not in vars(layer.input_layernorm)
        _, gradients = step(model)
    # Two layers have three; one norm's original stays in its wrapper, unused.
    assert count == 2 * 3 - 2 + 1
    assert any("input_layernorm" in name for name in gradients)
    assert any("modules_to_save" in name for name in gradients)


def test_the_gate_s_gradient_is_that_of_its_numbers():
    torch.manual_seed(0)
    g, u = (torch.randn(3, 5).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(SwiGLU.apply, (g, u))
    torch.testing.assert_close(SwiGLU.apply(g, u), F.silu(g) * u, rtol=0, atol=0)
