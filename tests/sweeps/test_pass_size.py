"""How much goes through the model at a time, and who trains in which group."""

import re
import time
from pathlib import Path

import pytest
import torch

import lorakit.sweeps.local as runner_module
from lorakit.engine.shared_pass import AdapterBatch, passes
from lorakit.errors import InputError
from lorakit.sweeps.pass_size import fewest_worth, measure_pass_size
from lorakit.training.forecast import TIGHT
from small_runs import weights
from sweeps.shared_sweeps import configurations, distance, runner_for, small, solo


def part(name: str, tokens: int) -> AdapterBatch:
    return AdapterBatch(name, {"input_ids": torch.zeros(1, tokens)})


def test_as_many_at_a_time_as_pay():
    assert fewest_worth({1: 100.0, 2: 103.0}) == 1
    assert fewest_worth({1: 100.0, 2: 150.0, 4: 155.0, 8: 300.0}) == 2
    assert fewest_worth({1: 100.0, 2: 150.0, 4: 200.0}) == 4


def test_passes_are_filled_in_order_and_one_part_may_be_too_large():
    parts = [part(name, tokens) for name, tokens in zip("abcd", (30, 20, 70, 10), strict=True)]
    names = [[p.adapter for p in each] for each in passes(parts, 50)]
    assert names == [["a", "b"], ["c"], ["d"]]
    assert passes(parts, None) == [parts]


def test_the_largest_batches_are_tried_until_more_do_not_fit():
    tried = []

    def run(parts):
        tried.append([p.adapter for p in parts])
        if len(parts) > 2:
            raise torch.OutOfMemoryError
        time.sleep(0.25)  # as long for two as for one, on a busy machine too

    size = measure_pass_size([part("small", 10), part("large", 40), part("middle", 20)], run)
    assert tried[0] == ["large"]
    assert tried[-1] == ["large", "middle", "small"]
    assert size.tokens == 60
    assert "3 do not fit into memory" in size.line


def test_what_was_measured_is_said_and_changes_no_weight(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base", max_steps=3) | {"dtype": "float64"}
    changes = [{"lora.lora_dropout": 0.2}, {"lora.r": 2}, {"lora.r": 3}]
    said: list[str] = []
    measured = configurations(values, tmp_path / "measured", changes)
    runner_for(values, say=said.append).advance(measured, 1.0)
    [line] = said
    assert re.match(
        r"3 configurations train at once; up to [\d,]+ tokens go through the model at a time: "
        r"1 at a time [\d,]+ tokens/s, 2 at a time [\d,]+ tokens/s.* \(.+\)$",
        line,
    )
    in_pairs = configurations(values, tmp_path / "pairs", changes)
    runner_for(values, at_once=2).advance(in_pairs, 1.0)
    for name in ("c00", "c01", "c02"):
        own, other = (weights(tmp_path / way / name) for way in ("measured", "pairs"))
        assert distance(own, other) < 1e-10


def test_who_cannot_share_batches_trains_by_itself_and_gives_the_weights_of_its_solo_run(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base", max_steps=3) | {"dtype": "float64"}
    reasons = {
        "it sets trainable_token_indices": {"lora.trainable_token_indices": [5, 6]},
        "it adapts the output layer lm_head by more than two plain factors": {
            "lora.target_modules": ["lm_head", "q_proj"],
            "lora.use_dora": True,
        },
        "init_lora_weights=loftq quantises the base": {"lora.init_lora_weights": "loftq"},
        "init_lora_weights=corda starts from data": {"lora.init_lora_weights": "corda"},
        "it keeps its best weights by evaluations of its own": {
            "early_stopping_patience": 1,
            "training.eval_strategy": "steps",
            "training.eval_steps": 1,
            "training.learning_rate": 0.5,
        },
    }
    said: list[str] = []
    sweep = configurations(values, tmp_path / "sweep", [*reasons.values(), {}, {"lora.r": 2}])
    found = runner_for(values, at_once=2, say=said.append).advance(sweep, 1.0)
    for i, reason in enumerate(reasons):
        assert f"c{i:02d} is trained by itself: {reason}" in said
    assert len(said) == len(reasons)
    assert list(found) == [c.name for c in sweep]
    for configuration in sweep:
        own = weights(Path(configuration.recipe.output_dir))
        assert distance(own, solo(configuration, tmp_path / "solo")) < 1e-9, configuration.changes


def test_the_parameters_of_a_configuration_are_counted_without_making_them(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base")
    changes = [{}, {"lora.r": 3, "lora.target_modules": ["embed_tokens", "q_proj", "up_proj"]}]
    base = runner_for(values).base
    for configuration in configurations(values, tmp_path, changes):
        with base.adapted({"default": configuration.recipe}) as resident:
            made = resident.model.get_nb_trainable_parameters()[0]
        assert base.trained_parameters(configuration.recipe) == made


def test_groups_are_no_larger_than_memory_allows(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = small(tiny_model, rows, tmp_path / "base", max_steps=2)
    sweep = configurations(values, tmp_path, [{}, {"lora.r": 2}, {"lora.r": 3}])
    said: list[str] = []
    runner = runner_for(values, say=said.append)
    each = 16e-6 * runner.base.trained_parameters(sweep[0].recipe)
    # PassSize for two and a half of the largest.
    monkeypatch.setattr(runner_module, "memory_mb", lambda: 5 * each / TIGHT)
    monkeypatch.setattr(runner_module, "used_memory_mb", lambda: 0.0)
    found = runner.advance(sweep, 1.0)
    assert said[0].startswith("2 of 3 configurations train at once: each takes ")
    assert [progress.step for progress in found.values()] == [2, 2, 2]


def test_configurations_of_other_models_or_rows_are_refused(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base")
    sweep = configurations(values, tmp_path, [{}, {"data.max_length": 20}])
    with pytest.raises(InputError, match=r"c01 differs in data.max_length"):
        runner_for(values).advance(sweep, 1.0)
