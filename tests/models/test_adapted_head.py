"""The loss behind a head with adapters is that of all logits, each span by its own adapter."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import LoraConfig, LoraModel
from lorakit.lora.routing import BASE, Route
from lorakit.lora.spans import Span
from lorakit.models import adapted_head, cross_entropy
from lorakit.models.adapted_head import Head, Targets, adapted_cross_entropy
from lorakit.models.loss import IGNORE, SupervisedLoss
from models.small import SMALL


@pytest.mark.parametrize(("chunk", "kept"), [(200, 0), (200, 2**20), (2**20, 2**20)])
@pytest.mark.parametrize("bent", [False, True])
def test_losses_and_gradients_are_those_of_all_logits(
    bent: bool, chunk: int, kept: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(adapted_head, "KEPT_BYTES", kept)
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    h, W, b = drawn(12, 8).requires_grad_(), drawn(40, 8), drawn(40)
    ranks = (1, 4, 2)
    factors = [f.requires_grad_() for r in ranks for f in (drawn(r, 8), drawn(40, r))]
    # The second overlaps the first, positions 9 to 11 have no adapter.
    spans = (Span(0, 5, 0.5), Span(3, 9, 2.0), Span(0, 0, 1.0))
    scale, softcap = (0.7, 3.0) if bent else (1.0, None)
    positions = torch.tensor([0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11])
    tokens = torch.randint(0, 40, (15,), generator=draw)
    smoothing = torch.linspace(0, 0.3, 12, dtype=torch.float64) if bent else None
    weights = drawn(15)
    weights[[1, 2, 3, 5, 13]] = 0  # positions 1, 3 and 10 have no gradient
    head = Head(W, b, scale, softcap, spans)
    found = adapted_cross_entropy(h, head, Targets(positions, tokens), factors, smoothing)
    (found * weights).sum().backward()
    own = [h.grad, *(f.grad for f in factors)]
    h.grad = None
    for factor in factors:
        factor.grad = None

    z = h @ W.T + b
    for span, A, B in zip(spans, factors[::2], factors[1::2], strict=True):
        rows = torch.zeros(12, 1, dtype=torch.float64)
        rows[span.begin : span.end] = span.scaling
        z = z + rows * (h @ A.T @ B.T)
    z = z * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    logp = z.log_softmax(-1)
    wanted = -logp[positions, tokens]
    if smoothing is not None:
        e = smoothing[positions]
        wanted = (1 - e) * wanted - e * logp.mean(-1)[positions]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    (wanted * weights).sum().backward()
    for mine, tensor in zip(own, [h, *factors], strict=True):
        torch.testing.assert_close(mine, tensor.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_several_heads_in_one_pass_are_those_of_the_model_s_own_logits(tied: bool):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"tie_word_embeddings": tied})).double()
    options: Any = {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": False}
    adapted = LoraModel(model, LoraConfig(r=1, **options), "one")
    adapted.add_adapter("two", LoraConfig(r=5, lora_alpha=20, **options))
    adapted.add_adapter("bodily", LoraConfig(r=2, target_modules=["v_proj"]))
    adapted.set_requires_grad(adapted.adapters)
    loss = SupervisedLoss(adapted)
    assert loss.output is None
    assert loss.adapted is not None
    ids = torch.randint(1, 60, (5, 9))
    labels = ids.clone()
    labels[1, :5] = labels[3, 2:7] = IGNORE
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    names = ("one", "two", BASE, "bodily")
    route = Route(rows=names, shape=(5, 9), sizes=(2, 1, 1, 1))
    with adapted.routing.using(route):
        found = loss.of_tokens(adapted, batch)
        found.sum().backward()
        own = {k: p.grad.clone() for k, p in adapted.named_parameters() if p.grad is not None}
        adapted.zero_grad()
        loss.adapted = None  # the model's own logits
        loss.keeps_logits = False
        wanted = loss.of_tokens(adapted, batch)
        wanted.sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert sum("lm_head" in key for key in own) == 4
    assert not any("embed" in key for key in own)
    for key, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(own[key], parameter.grad, rtol=1e-8, atol=1e-12)
