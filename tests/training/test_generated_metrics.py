"""Answers during training (`eval.generate`): scored at evaluations, logged, recorded."""

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.adapters.open import open_adapter
from lorakit.data.mixing import load_samples, mix
from lorakit.errors import InputError
from lorakit.evaluation.evaluate import evaluate
from lorakit.objectives.registry import make_objective
from lorakit.training.evaluation_recipe import GenerateSettings
from lorakit.training.generation import held_out_answers
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import set_up, training_arguments
from small_runs import lines, recipe

ROWS = [{"prompt": f"{n}?", "completion": "abcd"[n] * 2} for n in range(4)]
GENERATE = {"rows": 4, "metrics": ["exact_match", "rouge"], "max_new_tokens": 4}


@pytest.fixture
def values(tiny_model: Path, tmp_path: Path) -> dict[str, Any]:
    """Four rows that are learned by heart, and measured on."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"per_device_train_batch_size": 4, "learning_rate": 0.02, "max_steps": 60}
    settings |= {"eval_strategy": "steps", "eval_steps": 20, "lr_scheduler_type": "constant"}
    made = recipe(tiny_model, rows, tmp_path / "run", **settings)
    made["data"]["eval"] = str(rows)
    return made | {"eval": {"generate": GENERATE}}


def test_they_are_logged_recorded_before_and_after_and_are_those_of_lorakit_eval(
    values: dict[str, Any], tmp_path: Path
):
    values["training"] |= {"load_best_model_at_end": True, "metric_for_best_model": "exact_match"}
    result = lorakit.train(values, quiet=True)
    logged = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    assert {"eval_exact_match", "eval_rouge"} <= logged[0].keys()
    manifest = result.manifest
    assert manifest.eval_scores is not None
    assert manifest.base_eval_scores is not None
    assert manifest.eval_scores["exact_match"] == max(line["eval_exact_match"] for line in logged)
    assert manifest.eval_scores["exact_match"] > 0, "some are known by heart"
    assert manifest.base_eval_scores["exact_match"] == 0
    assert manifest.recipe["eval"]["generate"]["rows"] == 4

    opened = open_adapter(tmp_path / "run", dtype="float32")
    samples = load_samples(tmp_path / "rows.jsonl")
    options: dict[str, Any] = {"metrics": GENERATE["metrics"], "max_new_tokens": 4}
    found = evaluate(opened.model, opened.tokenizer, samples, **options)
    for name, both in found.scores.items():
        assert manifest.eval_scores[name] == pytest.approx(both["tuned"]), name
        assert manifest.base_eval_scores[name] == pytest.approx(both["base"]), name


def test_nothing_is_learned_otherwise_by_answering(values: dict[str, Any], tmp_path: Path):
    values["training"] |= {"max_steps": 4, "eval_steps": 2}
    values["lora"]["lora_dropout"] = 0.2
    first = lorakit.train(values, quiet=True)
    other = {k: v for k, v in values.items() if k != "eval"} | {"output_dir": str(tmp_path / "b")}
    second = lorakit.train(other, quiet=True)
    names = [r.output_dir / "adapter_model.safetensors" for r in (first, second)]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert "eval" not in second.manifest.recipe


def test_they_stop_early_and_larger_ones_are_better(values: dict[str, Any]):
    values["training"] |= {"metric_for_best_model": "rouge"}
    values["early_stopping_patience"] = 1
    given = load_recipe(values)
    assert training_arguments(given, held_out=True).greater_is_better
    assert set_up(given).answers is not None


def test_of_pairs_the_chosen_answer_is_compared_with_and_of_judged_ones_the_desirable(
    tokenizer: Any, attentive_model: Any, tmp_path: Path
):
    pairs = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(5)]
    judged = [{"prompt": f"{n}", "completion": "ab"[n % 2], "label": n % 2 == 0} for n in range(5)]
    rows = tmp_path / "rows.jsonl"
    for name, given, wanted in (("dpo", pairs, ["yes"] * 3), ("kto", judged, ["a"] * 3)):
        rows.write_text("".join(json.dumps(row) + "\n" for row in given))
        objective = make_objective(name)
        samples = mix(rows, kinds=objective.row_kinds).samples
        settings = GenerateSettings(rows=3)
        found = held_out_answers(settings, objective, samples, attentive_model, tokenizer)
        assert [texts[0] for texts in found.wanted] == wanted, name
        assert len(found.asked) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"eval": {"generate": {"metrics": ["rogue"]}}}, "eval.generate.metrics.*rouge"),
        ({"eval": {"generate": {"row": 3}}}, "eval.generate.row"),
        ({"eval": {"generate": {"rows": True}}}, "eval.generate.rows"),
        ({"eval": {"generate": {"rows": 0}}}, "eval.generate.rows"),
        ({"data": {"eval": 0}}, "held-out rows"),
        ({"eval": "held_out.jsonl"}, "data.eval"),
        ({"training": {"eval_strategy": "no"}}, "eval_strategy"),
        ({"objective": "reward"}, "eval.generate"),
        ({"eval": {}, "training": {"metric_for_best_model": "rouge"}}, "rouge"),
    ],
)
def test_what_cannot_be_generated_is_named_before_anything_is_written(
    values: dict[str, Any], changes: dict[str, Any], named: str
):
    if changes.get("objective") == "reward":
        pairs = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(6)]
        Path(values["data"]["train"]).write_text("".join(json.dumps(p) + "\n" for p in pairs))
    for key, value in changes.items():
        section = values.get(key)
        merged = isinstance(section, dict) and key != "eval"
        values[key] = {**section, **value} if merged else value
    if "metric_for_best_model" in values["training"]:
        values["early_stopping_patience"] = 2
    if changes.get("training", {}).get("eval_strategy") == "no":
        del values["training"]["eval_steps"]
    with pytest.raises(InputError, match=named):
        lorakit.train(values, quiet=True)
    assert not Path(values["output_dir"]).exists()


def test_a_sweep_says_that_it_has_its_own(values: dict[str, Any]):
    with pytest.raises(InputError, match=r"eval\.generate.*sweep\.objective"):
        lorakit.sweep(values, over={"lora.r": [2, 4]}, quiet=True)
