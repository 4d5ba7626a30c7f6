"""The loss over supervised positions is cross-entropy over the whole, position by position."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lorakit.lora import LoraModel
from lorakit.models import cross_entropy
from lorakit.models.loaded import in_evaluation
from lorakit.models.loss import IGNORE, SupervisedLoss, smoothed
from models.small import SMALL


class NoChoiceOfLogits(nn.Module):
    """The same model behind a forward that cannot leave logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, use_cache):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[0, :4] = IGNORE
    labels[2, 2:7] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "softcapped":  # Gemma 2 bends its logits: the model's own forward must do it
        config = Gemma2Config(**SMALL, head_dim=4, final_logit_softcapping=3.0)
        return Gemma2ForCausalLM(config).double()
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).double()
    return NoChoiceOfLogits(model) if kind == "without logits_to_keep" else model


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["plain", "softcapped", "without logits_to_keep"])
def test_it_equals_cross_entropy_over_all_logits_and_so_do_its_gradients(
    kind: str, frozen: bool, batch
):
    model = build(kind)
    # A frozen output layer takes the loss in chunks, a trained one through the model's forward.
    if hasattr(model, "lm_head"):
        model.lm_head.weight.requires_grad_(not frozen)
    loss = SupervisedLoss(model)
    assert (loss.output is not None) == (frozen and hasattr(model, "lm_head"))
    total, count = loss(model, batch)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    model.zero_grad()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    expected.backward()
    assert count == (targets != IGNORE).sum()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    assert found
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_what_is_not_supervised_has_no_part_in_it(batch):
    model = build("plain")
    total, _ = SupervisedLoss(model)(model, batch)
    batch["input_ids"][1, 7] = 5  # padding
    again, _ = SupervisedLoss(model)(model, batch)
    torch.testing.assert_close(total, again, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_losses_of_tokens_come_row_after_row(frozen: bool, batch):
    model = build("plain")
    model.lm_head.weight.requires_grad_(not frozen)
    loss = SupervisedLoss(model)
    found = loss.of_tokens(model, batch)
    counts = [loss.count(batch["labels"][i : i + 1]).item() for i in range(3)]
    for i, own in enumerate(found.split(counts)):
        one = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        torch.testing.assert_close(own.sum(), loss(model, one)[0])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["plain", "softcapped"])
def test_smoothed_labels_are_spread_over_the_vocabulary_and_so_are_their_gradients(
    kind: str, frozen: bool, batch, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 200)  # several chunks
    model = build(kind)
    model.lm_head.weight.requires_grad_(not frozen)
    loss = SupervisedLoss(model)
    assert (loss.output is not None) == frozen
    total, count = loss(model, batch, 0.1)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    model.zero_grad()
    logits = model(batch["input_ids"], batch["attention_mask"], use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    logp = logits.log_softmax(-1)[targets != IGNORE]
    one_hot = F.one_hot(targets[targets != IGNORE], logp.shape[-1]).double()
    soft = 0.9 * one_hot + 0.1 / logp.shape[-1]  # transformers' description of the argument
    expected = -(soft * logp).sum()
    expected.backward()
    assert count == len(logp)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    for name, gradient in found.items():
        parameter = model.get_parameter(name)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)

    plain = loss.of_tokens(model, batch)
    shares = torch.linspace(0, 0.3, len(plain), dtype=torch.float64)
    each = [loss.of_tokens(model, batch, float(share))[i] for i, share in enumerate(shares)]
    torch.testing.assert_close(loss.of_tokens(model, batch, shares), torch.stack(each))


def test_labels_answered_in_place_are_smoothed_as_pytorch_does_it():
    torch.manual_seed(0)
    logits = torch.randn(7, 3, dtype=torch.float64)
    targets = torch.tensor([0, 2, IGNORE, 1, 1, IGNORE, 0])
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(smoothed(logits, targets, 0.2), expected, rtol=1e-12, atol=1e-12)


def test_a_model_that_trains_nothing_is_measured_without_a_warning(batch):
    """Only whoever puts it into training mode is warned."""
    model = LoraModel(build("plain"), None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = SupervisedLoss(model)
        with in_evaluation(model):
            assert not any(module.training for module in model.modules())
            loss(model, batch)
    assert all(module.training for module in model.modules())
    with pytest.warns(UserWarning, match="no parameter of this model is trainable"):
        model.train()
