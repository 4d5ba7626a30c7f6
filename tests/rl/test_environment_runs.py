"""Whole runs that learn from conversations."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_environments import ADD, SURE, talk

import lorakit
from lorakit.errors import InputError
from lorakit.training.reproduce import reproduce
from small_runs import lines

ROWS = [{"prompt": f"{n} + {n}?", "answer": n % 3} for n in range(16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that calls a tool in half of its answers, and the environment `env.py`."""
    made = tmp_path_factory.mktemp("run")
    talk(made, {ADD: SURE, "Seven.": SURE}, noise=0.02)
    return made


def recipe(folder: Path, output: Path, **objective: Any) -> dict[str, Any]:
    return {
        "model": str(folder / "model"),
        "dtype": "float32",
        "data": {"eval": 0.25},
        "lora": {"r": 4, "target_modules": ["o_proj", "down_proj"]},
        "objective": {
            "type": "grpo",
            "environment": f"{folder}/env.py:Sums",
            "num_generations": 4,
            "max_completion_length": 100,
            "temperature_eval": 1.0,
            **objective,
        },
        "training": {
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "learning_rate": 8e-3,
            "per_device_train_batch_size": 4,
        },
        "samples": 0,
        "output_dir": str(output),
    }


def test_a_run_learns_to_call_a_tool_and_resumes_to_the_same_bytes(folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    found = lorakit.train(recipe(folder, run), data=ROWS, quiet=True).manifest
    logged = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert logged[0]["environment/turns"] < 1.8
    assert logged[-1]["environment/turns"] == 2.0
    assert found.eval_scores is not None
    assert found.base_eval_scores is not None
    assert found.eval_scores["reward"] > found.base_eval_scores["reward"]
    assert logged[-1]["rewards/Sums/mean"] == logged[-1]["reward"]
    assert logged[-1]["sampling/sampling_logp_difference/max"] < 1e-4
    # A turn is a phrase and its end: nothing of what stands between them is learned.
    turns = sum(line["environment/turns"] for line in logged) * 4 * 4
    assert 0 < found.supervised_tokens <= 2 * turns, "groups without a gradient are left out"
    assert found.train_tokens > 10 * found.supervised_tokens
    before = (run / "adapter_model.safetensors").read_bytes()
    for name in ("lorakit.json", "adapter_config.json", "adapter_model.safetensors"):
        (run / name).unlink()
    for file in (run / "checkpoint-4").iterdir():
        file.unlink()
    lorakit.train(recipe(folder, run), data=ROWS, resume=True, quiet=True)
    assert (run / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"environment": "nowhere.py:Sums"}, "no file nowhere.py"),
        ({"environment": "env.py:Sum"}, "did you mean 'Sums'"),
        ({"environment": {"type": "env.py:Sums", "board": 3}}, "takes no arguments"),
        ({"environment": "env.py:NoReward"}, "gives no reward"),
        ({"tools": ["env.py:missing"]}, "missing"),
        ({"environment": {"says": "x"}}, "type"),
        ({"environment": None, "max_turns": 3, "rewards": ["exact_match"]}, "max_turns"),
    ],
)
def test_an_environment_that_cannot_be_used_is_one_line_before_anything_is_written(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    says: str,
):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=says):
        lorakit.train(recipe(folder, tmp_path / "run", **changes), data=ROWS, quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_changed_environment_is_named_and_a_record_alone_runs_none(folder: Path, tmp_path: Path):
    (tmp_path / "env.py").write_text((folder / "env.py").read_text() + "\nimport tables\n")
    (tmp_path / "tables.py").write_text(
        "from pathlib import Path\nPath(__file__ + '.ran').touch()\n"
    )
    made = recipe(folder, tmp_path / "run", environment=f"{tmp_path}/env.py:Sums")
    made["training"] |= {"max_steps": 1, "save_steps": 1}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made["data"]["train"] = str(tmp_path / "rows.jsonl")
    found = lorakit.train(made, quiet=True).manifest
    assert found.environment.keys() == {"env.py", "tables.py"}
    (ran := tmp_path / "tables.py.ran").unlink()
    with pytest.raises(InputError, match=r"env\.py:Sums.*--run-rewards"):
        reproduce(tmp_path / "run", tmp_path / "again")
    assert not ran.exists()
    (tmp_path / "tables.py").write_text("# nothing\n")
    with pytest.raises(InputError, match=r"environment differ.*tables\.py"):
        reproduce(tmp_path / "run", tmp_path / "again", run_rewards=True, quiet=True)
    (tmp_path / "run" / "lorakit.json").unlink()
    with pytest.raises(InputError, match=r"environment\.tables\.py"):
        lorakit.train(made, resume=True, quiet=True)
