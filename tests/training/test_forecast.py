"""A forecast trains real batches and leaves nothing of it; its counts are those of the run."""

from pathlib import Path

import pytest
import torch

import lorakit
from lorakit.training.check import check
from lorakit.training.forecast import Forecast, _all_batches, forecast, planned_steps
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import set_up
from matrix import few
from small_runs import lines, recipe


@pytest.mark.parametrize(
    "training",
    few(
        [
            {"max_steps": 7, "eval_strategy": "steps", "eval_steps": 3},
            {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 0.5},
            {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2},
            {"max_steps": -1, "num_train_epochs": 1.5},
            {"max_steps": 4, "eval_strategy": "no"},
        ],
        {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 0.5},
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2},
    ),
)
def test_steps_and_evaluations_are_those_of_the_run(
    training: dict, tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run", **training)
    expected = check(load_recipe(values)).forecast
    assert expected is not None
    assert not (tmp_path / "run").exists()
    result = lorakit.train(values, quiet=True)
    held_out = [e for e in lines(tmp_path / "run/metrics.jsonl") if "eval_loss" in e]
    assert expected.steps == result.manifest.steps
    assert expected.evaluations == len(held_out) + 1  # the base model's own


def test_weights_random_numbers_and_mode_are_left_as_they_were(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run")
    values["lora"] |= {"lora_dropout": 0.2, "init_lora_weights": False}
    setup = set_up(load_recipe(values))
    trainer = setup.trainer()
    before = {name: p.clone() for name, p in setup.model.named_parameters()}
    random = torch.get_rng_state()
    result = forecast(trainer)
    assert 0 < result.train_seconds < result.seconds
    assert result.error > 0
    assert result.longest_tokens >= max(map(len, setup.data.train))
    assert torch.equal(torch.get_rng_state(), random)
    for name, parameter in setup.model.named_parameters():
        assert torch.equal(parameter.view(torch.int32), before[name].view(torch.int32)), name
        assert parameter.grad is None


def test_a_run_with_a_forecast_gives_the_bytes_of_one_without(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def trained(name: str) -> bytes:
        values = recipe(tiny_model, rows, tmp_path / name, max_steps=12)
        values["lora"]["lora_dropout"] = 0.1
        folder = lorakit.train(values, quiet=True).output_dir
        return (folder / "adapter_model.safetensors").read_bytes()

    without = trained("without")
    monkeypatch.setattr("lorakit.training.run.FORECAST_FROM", 1)
    assert trained("with") == without


@pytest.mark.parametrize("accumulation", few([1, 2, 8], 2))
def test_the_tokens_of_a_forecast_are_those_that_the_run_trains(
    accumulation: int, tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(
        *(tiny_model, rows, tmp_path / "run"),
        max_steps=-1,
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
    )
    trainer = set_up(load_recipe(values)).trainer()
    steps = planned_steps(trainer.args, len(trainer.sampler))
    lengths = [len(row) for row in trainer.train_dataset.rows]
    forecast_tokens = sum(lengths[i] for batch in _all_batches(trainer, steps) for i in batch)
    manifest = lorakit.train(values, quiet=True).manifest
    assert (steps, forecast_tokens) == (manifest.steps, manifest.train_tokens)


@pytest.mark.parametrize(
    ("seconds", "words"), [(42, "42 s ± 4 s"), (700, "12 min ± 70 s"), (30000, "8.3 h ± 50 min")]
)
def test_a_forecast_speaks_in_the_unit_that_tells_most(seconds: float, words: str):
    line = Forecast(10, seconds, seconds / 10, 0, 0, 2, 0, 3000, 25000).line
    assert words in line
    assert "peak memory 3.0 of 25 GB" in line
