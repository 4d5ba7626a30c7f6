"""A model in training samples with its factors packed, and goes on training as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit import LoraConfig, get_peft_model
from lorakit.engine import rows_at_once
from lorakit.engine import sampler as sampler_module
from lorakit.engine.batch import ContinuousBatch
from lorakit.engine.choosing import Chooser, choose_together
from lorakit.engine.decode_step import DecodeStep
from lorakit.engine.sampler import Sampler, answering
from lorakit.engine.sampling import Sampling
from lorakit.lora.routing import BASE, Route
from lorakit.models.fused import fused

PROMPTS = [[40, 41, 42], list(range(100, 130)), [7, 9, 7, 5]]


def drawing(seed: int, tokens: int = 20) -> Sampling:
    return Sampling(1.0, max_new_tokens=tokens, seed=seed, logprobs=0, end_tokens=frozenset())


@pytest.mark.parametrize("dora", [False, True])
def test_a_sampled_model_has_its_own_weights_again_and_trains_on(
    base: Path, dora: bool, monkeypatch: pytest.MonkeyPatch
):
    loaded, tokenizer = lorakit.load_model(str(base), "float32")
    config = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
    torch.manual_seed(0)
    model: Any = get_peft_model(loaded, config).eval()
    before = {
        name: (weight, weight.detach().clone(), weight.stride())
        for name, weight in model.get_base_model().named_parameters()
    }
    sampler, packed = Sampler(model, tokenizer), []
    layer = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    handle = layer.register_forward_pre_hook(lambda *_: packed.append(layer.family is not None))
    asked = [prompt for prompt in PROMPTS for _ in range(2)]
    settings = [drawing(seed) for seed in range(6)]
    route = Route(shared=("default",))
    found = sampler.write(asked, settings, route)
    assert packed[-1]
    handle.remove()
    for name, weight in model.get_base_model().named_parameters():
        same, values, stride = before[name]
        assert weight is same
        assert torch.equal(weight, values)
        assert weight.stride() == stride
        if "base_layer" in name:
            assert weight.untyped_storage().nbytes() == weight.nbytes
    monkeypatch.setattr(sampler_module, "PACKS_FROM", 10**9)
    plain = sampler.write(asked, settings, route)
    assert [row.tokens for row in found] == [row.tokens for row in plain]
    # Log-probabilities are those of the forward that trains, which has gradients.
    for row in found:
        ids = torch.tensor([[*row.prompt, *row.tokens]])
        logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, ids[0, len(row.prompt) :, None])[:, 0]
        own.sum().backward()
        told = torch.tensor([c.logprob for piece in row.ticket for c in piece.logprobs])
        torch.testing.assert_close(told, own.detach(), rtol=0, atol=2e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    # With values that have changed answers are those of the new ones.
    with torch.no_grad():
        for p in trained:
            p.add_(p.grad, alpha=0.05)
    again = sampler.write(asked, settings, route)
    monkeypatch.undo()
    changed = sampler.write(asked, settings, route)
    assert [row.tokens for row in again] == [row.tokens for row in changed]
    assert [row.tokens for row in again] != [row.tokens for row in found]


def test_rows_of_several_adapters_are_sampled_with_the_factors_of_all_of_them_packed(
    base: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded, tokenizer = lorakit.load_model(str(base), "float32")
    torch.manual_seed(0)
    values: Any = {"init_lora_weights": False}
    model: Any = get_peft_model(loaded, LoraConfig(r=3, target_modules="all-linear", **values), "a")
    model.add_adapter("b", LoraConfig(r=5, target_modules=["v_proj", "up_proj"], **values))
    model.add_adapter("c", LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], **values))
    model.add_adapter("idle", LoraConfig(r=4, **values))
    sampler, packed = Sampler(model.eval(), tokenizer), list[set[str]]()
    steps = ContinuousBatch.step

    def noted(batch: ContinuousBatch) -> None:
        if (now := model.packed) is not None:
            packed.append({name for name in model.adapters if name in now})
        steps(batch)

    monkeypatch.setattr(ContinuousBatch, "step", noted)
    who = ["a", BASE, "b", "a", "c", "b"]
    asked = [prompt for prompt in PROMPTS for _ in range(2)]
    settings = [drawing(seed) for seed in range(6)]
    before = [weight.stride() for weight in model.get_base_model().parameters()]
    found = sampler.write(asked, settings, Route(), adapters=who)
    assert packed[-1] == {"a", "b", "c"}
    assert model.packed is None
    assert [weight.stride() for weight in model.get_base_model().parameters()] == before
    for name, row in zip(who, found, strict=True):
        ids = torch.tensor([[*row.prompt, *row.tokens]])
        with model.routing.using(Route(shared=() if name == BASE else (name,))), torch.no_grad():
            logs = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
        own = logs.gather(1, ids[0, len(row.prompt) :, None])[:, 0]
        told = torch.tensor([c.logprob for piece in row.ticket for c in piece.logprobs])
        torch.testing.assert_close(told, own, rtol=0, atol=2e-5)
    monkeypatch.setattr(sampler_module, "PACKS_FROM", 10**9)
    plain = sampler.write(asked, settings, Route(), adapters=who)
    assert [row.tokens for row in found] == [row.tokens for row in plain]


def test_the_base_of_an_adapter_that_is_off_is_written_by_the_function_of_a_step(
    base: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded, tokenizer = lorakit.load_model(str(base), "float32")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(loaded, config).eval()
    sampler, steps, call = Sampler(model, tokenizer), [0], DecodeStep.__call__
    settings = [drawing(seed) for seed in range(3)]
    of_base = sampler.write(PROMPTS, settings, Route())

    def counted(*given: Any) -> torch.Tensor:
        steps[0] += 1
        return call(*given)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    with model.disable_adapter(), answering(model) as route:
        found = sampler.write(PROMPTS, settings, route)
    assert steps[0] >= 19
    assert [row.tokens for row in found] == [row.tokens for row in of_base]


def test_a_model_that_is_fused_for_training_samples_by_the_function_of_a_step(
    base: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded, tokenizer = lorakit.load_model(str(base), "float32")
    model: Any = get_peft_model(loaded, LoraConfig(r=2, target_modules="all-linear")).train()
    sampler, steps, call = Sampler(model, tokenizer), [0], DecodeStep.__call__

    def counted(*given: Any) -> torch.Tensor:
        steps[0] += 1
        return call(*given)

    monkeypatch.setattr(DecodeStep, "__call__", counted)
    with fused(model) as count:
        assert count
        replaced = [module for module in model.modules() if "forward" in vars(module)]
        with answering(model) as route:
            sampler.write(PROMPTS, [drawing(seed) for seed in range(3)], route)
        assert [module for module in model.modules() if "forward" in vars(module)] == replaced
    assert steps[0] >= 19


def test_more_answers_than_memory_has_room_for_are_written_one_after_the_other(
    base: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded, tokenizer = lorakit.load_model(str(base), "float32")
    model: Any = get_peft_model(loaded, LoraConfig(r=2, init_lora_weights=False)).eval()
    sampler, route = Sampler(model, tokenizer), Route(shared=("default",))
    settings = [drawing(seed, 8) for seed in range(3)]
    expected = [row.tokens for row in sampler.write(PROMPTS, settings, route)]
    sampler = Sampler(model, tokenizer)
    monkeypatch.setattr(rows_at_once, "bytes_of_row", lambda _: (1 << 60, 0))
    assert [row.tokens for row in sampler.write(PROMPTS, settings, route)] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_choose_together_choose_as_each_alone(dtype: torch.dtype):
    torch.manual_seed(0)
    logits = torch.randn(6, 1000, dtype=dtype) * 3
    logits[0, :900] = -torch.inf
    logits[1, 100:] = -torch.inf
    sampling = [
        Sampling(1.0, seed=1, logprobs=0),
        Sampling(1.0, seed=2, logprobs=0),
        Sampling(0.7, seed=3, logprobs=0),
        Sampling(0.7, seed=4, logprobs=0, scaled_logprobs=True),
        Sampling(0.0, logprobs=0),
        Sampling(1.3, seed=5),
    ]
    device = torch.device("cpu")
    together = [Chooser(one, [], device) for one in sampling]
    alone = [Chooser(one, [], device) for one in sampling]
    logs = logits.log_softmax(-1)
    scaled = (logits / 0.7).log_softmax(-1)
    for _ in range(200):
        tokens, logprobs = choose_together(logits, together)
        assert tokens == [c.choose(own.clone()) for c, own in zip(alone, logits, strict=True)]
        for row, token in enumerate(tokens[:5]):
            wanted = (scaled if row == 3 else logs)[row, token]
            assert logprobs[row] == pytest.approx(wanted.item(), abs=1e-5)
        assert tokens[0] >= 900
        assert tokens[1] < 100
        assert tokens[4] == int(logits[4].argmax())


def test_a_large_vocabulary_is_drawn_from_by_its_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(5000)
    wanted = logits.softmax(-1)
    chooser = Chooser(Sampling(1.0, seed=7), [], torch.device("cpu"))
    many = [Chooser(Sampling(1.0, seed=s), [], torch.device("cpu")) for s in range(500)]
    counts = torch.zeros(5000)
    for _ in range(40):
        tokens, _ = choose_together(logits.expand(500, -1), many)
        counts += torch.bincount(torch.tensor(tokens), minlength=5000)
    # Tokens in fifty groups by their numbers: within five standard deviations each.
    groups, expected = counts.view(50, 100).sum(1), wanted.view(50, 100).sum(1) * counts.sum()
    assert ((groups - expected).abs() <= 5 * expected.sqrt()).all()
    assert 0 <= chooser.choose(logits.clone()) < 5000
