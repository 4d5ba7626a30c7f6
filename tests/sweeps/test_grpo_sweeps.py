"""Configurations of objective grpo: their prompts are answered together, each as by itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.adapters.manifest import read_manifest
from lorakit.engine import sampler
from lorakit.errors import InputError
from lorakit.rl.engine_rollouts import EngineRollouts
from small_runs import lines, weights
from sweeps.shared_sweeps import configurations, distance, runner_for, solo

REWARDS = """
def vowels(completions, **columns):
    return [text.count("a") / 8 + text.count("e") / 16 for text in completions]
"""
CURVES = ("loss", "reward", "entropy", "grad_norm", "completions/mean_length")


def recipe(model: Path, folder: Path, **objective: Any) -> dict[str, Any]:
    rows = folder / "prompts.jsonl"
    prompts = [{"prompt": f"Say {n} " * (1 + n % 3), "n": n} for n in range(12)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    held_out = folder / "held_out.jsonl"
    judged = [{"prompt": f"Tell {n}", "n": n} for n in range(16)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in judged))
    (folder / "rewards.py").write_text(REWARDS)
    grpo = {"type": "grpo", "num_generations": 4, "max_completion_length": 8}
    grpo |= {"temperature_eval": 1.0}  # of greedy completions none has a reward
    return {
        "model": str(model),
        "dtype": "float64",
        "data": {"train": str(rows), "eval": str(held_out)},
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {
            "max_steps": 3,
            "logging_steps": 1,
            "learning_rate": 2e-2,
            "per_device_train_batch_size": 2,
            "eval_strategy": "no",
        },
        "objective": grpo | {"rewards": [f"{folder / 'rewards.py'}:vowels"]} | objective,
        "samples": 0,
        "compile": False,
        "output_dir": str(folder / "base"),
    }


CHANGES: list[dict[str, Any]] = [
    {"objective.beta": 0.0},
    {"objective.beta": 0.2},
    {"training.learning_rate": 5e-3, "lora.r": 2},
    {"objective.loss_type": "grpo", "lora.lora_dropout": 0.1},
]


def test_configurations_that_sample_together_have_the_curves_and_weights_of_their_solo_runs(
    attentive_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    together: list[set[str]] = []
    write_each = EngineRollouts.write_each

    def noted(self: Any, asked: Any, adapters: Sequence[str], model: Any) -> Any:
        together.append({*adapters})
        return write_each(self, asked, adapters, model)

    values = recipe(attentive_folder, tmp_path)
    sweep = configurations(values, tmp_path / "sweep", CHANGES)
    runner = runner_for(values, at_once=len(sweep))
    with monkeypatch.context() as patch:
        patch.setattr(EngineRollouts, "write_each", noted)
        patch.setattr(sampler, "PACKS_FROM", 1)
        found = runner.advance(sweep, 1.0)
    # Once for each step, and once for the held-out prompts.
    assert together == [{f"part{i}" for i in range(4)}] * 4
    for configuration in sweep:
        own = Path(configuration.recipe.output_dir)
        wanted = solo(configuration, tmp_path / "solo")
        assert distance(weights(own), wanted) < 1e-9, configuration.changes
        alone = tmp_path / "solo" / configuration.name
        names = (*CURVES, *(["kl"] if configuration.changes.get("objective.beta") else []))
        for name in names:
            curves = [
                [line[name] for line in lines(folder / "metrics.jsonl") if name in line]
                for folder in (own, alone)
            ]
            assert len(curves[1]) == 3, name
            assert curves[0] == pytest.approx(curves[1], abs=1e-9), name
        record = read_manifest(alone)
        assert record is not None
        scores = found[configuration.name].scores
        assert scores["loss"] == pytest.approx(record.eval_loss, abs=1e-9)
        assert scores["reward"] == pytest.approx(-record.eval_loss, abs=1e-9)


def test_a_sweep_over_rewards_runs_from_end_to_end(attentive_folder: Path, tmp_path: Path):
    values = recipe(attentive_folder, tmp_path)
    table = lorakit.sweep(
        values,
        over={"objective.beta": [0.0, 0.1], "objective.temperature": [1.0, 0.7]},
        prune=False,
        quiet=True,
    )
    assert sorted(row["changes"]["objective.temperature"] for row in table) == [0.7, 0.7, 1, 1]
    assert all(row["step"] == 3 and row["diverged"] is None for row in table)
    means = [row["selection"]["mean"] for row in table]  # minus the mean reward
    assert means == sorted(means)
    assert means[0] < 0


@pytest.mark.parametrize(
    ("changes", "over", "says"),
    [
        ({"rewards": [{"adapter": "runs/reward"}]}, {"objective.beta": [0.0, 0.1]}, "runs/reward"),
        ({}, {"objective.rewards": [["json"], [{"adapter": "runs/reward"}]]}, "lorakit train"),
        ({"environment": "env.py:Game"}, {"objective.beta": [0.0, 0.1]}, "environment"),
    ],
)
def test_what_needs_more_than_the_resident_model_is_refused_before_it_is_loaded(
    changes: dict[str, Any], over: dict[str, Any], says: str, tmp_path: Path
):
    values = recipe(tmp_path / "no model", tmp_path, **changes)
    with pytest.raises(InputError, match=says):
        lorakit.sweep(values, over=over, quiet=True)
    assert not (tmp_path / "base").exists()
