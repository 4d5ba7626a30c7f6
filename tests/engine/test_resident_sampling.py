"""Answers of a resident model are written with the weights that it trains."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lorakit
from answered import alone, tokens
from lorakit import LoraConfig
from lorakit.engine.adapter_optimizer import AdamW
from lorakit.engine.engine import Engine
from lorakit.engine.resident import ResidentModel
from lorakit.engine.sampled import Sampled
from lorakit.engine.sampling import Sampling
from lorakit.engine.token_losses import AdapterRow
from lorakit.errors import InputError
from lorakit.lora.routing import BASE

CONFIGS = {
    "plain": LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False),
    "dora": LoraConfig(r=2, use_dora=True, target_modules=["v_proj", "up_proj"]),
    "head": LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
}
PROMPTS = [[40, 41, 42], list(range(100, 130)), [7, 9, 7, 5], [90], [3, 3]]
WHO = ["plain", "dora", BASE, "head", "plain"]
GREEDY = Sampling(max_new_tokens=8)


@pytest.fixture
def model(base: Path) -> ResidentModel:
    made = ResidentModel(lorakit.load_model(str(base), "float32")[0])
    for name, config in CONFIGS.items():
        made.create(name, config)
    return made


def train(model: ResidentModel, steps: int) -> None:
    for step in range(steps):
        ids = [(11 * i + step) % 250 for i in range(12)]
        model.forward_backward([AdapterRow(name, ids, ids) for name in CONFIGS])
        for name in CONFIGS:
            model.optim_step(name, AdamW(learning_rate=2e-2))


def check(model: ResidentModel, base: Path, folder: Path, max_rows: int) -> list[Sampled]:
    """Samples, which are what `generate` writes with what `save` writes now."""
    for name in CONFIGS:
        model.save(name, folder / name)
    found = model.sample(PROMPTS, WHO, GREEDY, ends=[257], max_rows=max_rows)
    for prompt, name, sample in zip(PROMPTS, WHO, found, strict=True):
        saved = None if name == BASE else folder / name
        assert sample.tokens == alone(base, saved, prompt, 8, [257])
    return found


def test_samples_are_those_of_generate_with_the_weights_as_they_are(
    model: ResidentModel, base: Path, tmp_path: Path
):
    train(model, 2)
    before = check(model, base, tmp_path, max_rows=8)
    train(model, 3)
    after = check(model, base, tmp_path, max_rows=2)
    for name, one, other in zip(WHO, before, after, strict=True):
        assert (one.tokens == other.tokens) == (name == BASE)
    # Log-probabilities are those of the pass that trains.
    rows = [
        AdapterRow(name, [*prompt, *sample.tokens], [-100] * len(prompt) + sample.tokens)
        for prompt, name, sample in zip(PROMPTS, WHO, after, strict=True)
    ]
    seen = model.forward(rows).logprobs
    for sample, logprobs in zip(after, seen, strict=True):
        torch.testing.assert_close(torch.tensor(sample.logprobs), logprobs, rtol=0, atol=1e-5)
    trained = model.forward_backward([row for row in rows if row.adapter != BASE])
    own = [part for part, name in zip(seen, WHO, strict=True) if name != BASE]
    for part, logprobs in zip(trained.logprobs, own, strict=True):
        torch.testing.assert_close(part, logprobs, rtol=0, atol=1e-5)


def test_a_base_that_was_sampled_from_trains_as_one_that_was_not(base: Path):
    models = [ResidentModel(lorakit.load_model(str(base), "float32")[0]) for _ in range(2)]
    assert models[0].sample(PROMPTS[:1], [BASE], GREEDY)[0].tokens
    for model in models:
        for name, config in CONFIGS.items():
            model.create(name, config)
    models[0].sample(PROMPTS, WHO, GREEDY)
    for model in models:
        train(model, 2)
    for name in CONFIGS:
        for key, tensor in models[0].trained(name).items():
            torch.testing.assert_close(tensor, models[1].trained(name)[key], rtol=1e-4, atol=1e-5)
        models[0].remove(name)
    assert not any("lora" in path for path, _ in models[0].base.named_modules())


def test_a_seed_repeats_samples_and_differs_from_row_to_row(model: ResidentModel):
    hot = Sampling(max_new_tokens=6, temperature=2.0, seed=5)
    found, again = (
        [sample.tokens for sample in model.sample([[7, 8]] * 3, ["plain"] * 3, hot, max_rows=rows)]
        for rows in (3, 1)
    )
    assert found == again
    assert len(set(map(str, found))) == 3


def test_what_cannot_be_sampled_is_refused(model: ResidentModel):
    for prompts, names, sampling, message in (
        ([[1]], ["plian"], GREEDY, "did you mean"),
        ([[1], [2]], ["plain"], GREEDY, "as many adapters"),
        ([[]], ["plain"], GREEDY, "empty"),
        ([[10**6]], ["plain"], GREEDY, "from 0 to"),
        ([[1] * 512], ["plain"], GREEDY, "shorten"),
        ([[1]], ["plain"], Sampling(stop=("x",)), "stop"),
    ):
        with pytest.raises(InputError, match=message):
            model.sample(prompts, names, sampling)
    assert model.sample([], []) == []


def test_what_an_engine_serves_is_a_resident_model(start: Callable[..., Engine]):
    engine = start()
    names = ["shop", "poet", "few", "mixed"]
    settings = Sampling(max_new_tokens=8, logprobs=0)
    tickets = [engine.submit(*asked, settings) for asked in zip(PROMPTS, names, strict=False)]
    served = [tokens(ticket) for ticket in tickets]
    keys = [engine.pool.version(name).key for name in names]
    assert engine.resident.adapters == keys
    found = engine.resident.sample(PROMPTS[:4], keys, GREEDY, ends=[257])
    assert [sample.tokens for sample in found] == served
