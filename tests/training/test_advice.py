"""What a recipe leaves out is chosen by model and rows, said, and recorded; what it says stays."""

from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.training.advice import advised
from lorakit.training.recipe import load_recipe
from small_runs import recipe

BASE: dict[str, Any] = {"model": "m", "data": {"train": "d.jsonl"}, "output_dir": "out"}


@pytest.mark.parametrize(
    ("parameters", "rows", "chosen"),
    [
        (135_000_000, 100, (16, 32, 5e-4, 5)),
        (135_000_000, 5_000, (16, 32, 5e-4, 3)),
        (7_000_000_000, 20_000, (32, 64, 2e-4, 2)),
        (70_000_000_000, 100_000, (64, 128, 1e-4, 1)),
    ],
)
def test_what_is_left_out_goes_by_the_model_and_the_rows(
    parameters: int, rows: int, chosen: tuple[float, ...]
):
    filled, advice = advised(load_recipe(BASE), parameters, rows)
    training = filled.training
    assert (
        filled.lora["r"],
        filled.lora["lora_alpha"],
        training.learning_rate,
        training.num_train_epochs,
    ) == chosen
    keys = ["lora.r", "lora.lora_alpha", "training.learning_rate", "training.num_train_epochs"]
    assert [a.key for a in advice] == keys
    assert all(a.why for a in advice)


def test_what_the_recipe_says_stays_and_alpha_follows_a_rank_that_is_given():
    given = ["lora.r=8", "training.learning_rate=1e-3", "training.max_steps=10"]
    filled, advice = advised(load_recipe(BASE, given), 135_000_000, 100)
    assert [a.line for a in advice] == ["lora.lora_alpha=16: twice the rank"]
    assert filled.lora_config().lora_alpha == 16
    assert filled.training.learning_rate == 1e-3
    nothing, advice = advised(filled, 135_000_000, 100)
    assert (nothing, advice) == (filled, [])


def test_what_was_chosen_is_printed_recorded_and_the_same_when_a_run_goes_on(
    tiny_model: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    values = recipe(tiny_model, rows, tmp_path / "run", save_steps=3)
    values["lora"] = {}
    del values["training"]["learning_rate"]
    result = lorakit.train(values)
    assert "chosen: lora.r=16: recommended for generation with a small model" in (
        capfd.readouterr().err
    )
    assert {a["key"]: a["value"] for a in result.manifest.advice} == {
        "lora.r": 16,
        "lora.lora_alpha": 32,
        "training.learning_rate": 5e-4,
    }
    assert result.manifest.recipe["training"]["learning_rate"] == 5e-4
    assert lorakit.train(values, resume=True).manifest == result.manifest
