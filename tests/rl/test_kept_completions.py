"""What a run with rewards keeps: completions, held-out rewards, hashes; and what the page shows."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import lorakit
from command import run_lorakit
from lorakit.errors import InputError
from lorakit.report.completions import read_completions, read_held_out
from small_runs import lines

REWARDS = """
def vowels(completions, **kwargs):
    kwargs["log_metric"]("letters", sum(map(len, completions)))
    kwargs["log_extra"]("first", [text[:1] for text in completions])
    return [text.count("a") / 8 for text in completions]

def odd(completions, n, **kwargs):
    return [None if i % 2 else float(len(text)) for i, text in zip(n, completions)]
"""


@pytest.fixture
def run(attentive_folder: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"Say {n}", "n": n} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = [f"{tmp_path}/rewards.py:{name}" for name in ("vowels", "odd")]
    return {
        "model": str(attentive_folder),
        "dtype": "float32",
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 0.25},
        "lora": {"r": 4},
        "objective": {
            "type": "grpo",
            "num_generations": 4,
            "max_completion_length": 6,
            "rewards": named,
            "weights": [1.0, 0.1],
        },
        "training": {
            "max_steps": 4,
            "logging_steps": 1,
            "save_steps": 1,
            "save_total_limit": None,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
        },
        "samples": 0,
        "output_dir": str(tmp_path / "run"),
    }


def test_a_run_keeps_its_completions_and_resumes_to_the_same(run: dict[str, Any], tmp_path: Path):
    folder = tmp_path / "run"
    found = lorakit.train(run, quiet=True)
    kept, held_out = (folder / name for name in ("completions.jsonl", "held_out_rewards.json"))
    steps = read_completions(folder, [])
    assert [one.step for one in steps] == [1, 2, 3, 4]
    assert steps[0].rewards == ["vowels", "odd"]
    assert all(len(one.groups) == 2 for one in steps)
    logged = lines(folder / "metrics.jsonl")
    for step, line in zip(steps, [x for x in logged if "loss" in x], strict=True):
        totals = [value for group in step.groups for value in group.reward if value is not None]
        assert sum(totals) / len(totals) == pytest.approx(line["reward"], abs=1e-5)
        for group in step.groups:
            n = int(group.where.rpartition(":")[2]) - 1
            assert all((row[1] is None) == bool(n % 2) for row in group.values)
            assert group.prompt == f"Say {n}"
            assert group.completion is not None
    assert lines(kept)[0]["metrics"]["letters"] > 0
    assert "first" in lines(kept)[0]["groups"][0]["extra"]
    rewards = read_held_out(folder, [])
    assert rewards is not None
    assert set(rewards.states) == {"base", "tuned"}
    scores = {"base": found.manifest.base_eval_scores, "tuned": found.manifest.eval_scores}
    for state, of_state in scores.items():
        interval = rewards.interval(state, -1)
        assert interval is not None
        assert interval.mean == pytest.approx(of_state["reward"], abs=1e-5)
    page = (folder / "report.html").read_text()
    assert 'class="band"' in page
    before = kept.read_bytes(), held_out.read_bytes(), page
    for name in ("lorakit.json", "adapter_model.safetensors", "held_out_rewards.json"):
        (folder / name).unlink()
    for step in (3, 4):
        for file in (folder / f"checkpoint-{step}").iterdir():
            file.unlink()
    lorakit.train(run, resume=True, quiet=True)
    assert (kept.read_bytes(), held_out.read_bytes()) == before[:2]


def test_a_record_alone_runs_no_file(run: dict[str, Any], tmp_path: Path):
    (tmp_path / "rewards.py").write_text(
        REWARDS + "\nimport pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()\n"
    )
    run["training"]["max_steps"] = 1
    lorakit.train(run, quiet=True)
    ran = tmp_path / "rewards.ran"
    assert ran.exists()
    ran.unlink()
    done = run_lorakit(tmp_path, "reproduce", "run")
    assert done.returncode == 2
    assert "--run-rewards" in done.stderr
    assert not ran.exists()
    done = run_lorakit(tmp_path, "reproduce", "run", "--run-rewards")
    assert done.returncode == 0, done.stderr
    assert "the same adapter to the bit" in done.stdout
    (tmp_path / "rewards.py").write_text(REWARDS)
    done = run_lorakit(tmp_path, "reproduce", "run", "--run-rewards", "-o", "again")
    assert done.returncode == 2
    assert "vowels" in done.stderr


def test_a_reward_that_hangs_on_a_row_costs_that_row_alone(run: dict[str, Any], tmp_path: Path):
    (tmp_path / "rewards.py").write_text(
        "import re\n"
        "def matches(completions, n, trainer_state, **kwargs):\n"
        "    assert trainer_state.max_steps == 2\n"
        "    texts = ['a' * 40 + 'b' if i == 3 else text for i, text in zip(n, completions)]\n"
        "    found = [bool(re.match('(a+)+$', text)) for text in texts]\n"
        "    return [hit + len(set(text)) for hit, text in zip(found, texts)]\n"
    )
    run["objective"] |= {"rewards": ["rewards.py:matches"], "weights": None, "reward_timeout": 0.3}
    run["objective"] |= {"num_generations": 2}
    run["data"]["eval"] = 0
    run["training"] |= {"max_steps": 2, "per_device_train_batch_size": 12}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(run))
    done = run_lorakit(tmp_path, "train", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "lorakit.json").read_text())
    (warning,) = [one for one in record["warnings"] if "matches" in one["warning"]]
    assert "rows.jsonl:4" in warning["message"]
    assert "limit of time" in warning["message"]
    for step in read_completions(tmp_path / "run", []):
        for group in step.groups:
            hangs = group.where == "rows.jsonl:4"
            assert all((row[0] is None) == hangs for row in group.values)


def test_a_run_whose_reward_has_changed_is_not_resumed_unseen(run: dict[str, Any], tmp_path: Path):
    found = lorakit.train(run, quiet=True)
    (fact, _) = found.manifest.rewards
    assert list(fact["sha256"]) == ["rewards.py"]
    (tmp_path / "run" / "lorakit.json").unlink()
    (tmp_path / "rewards.py").write_text(REWARDS.replace("/ 8", "/ 4"))
    with pytest.raises(InputError, match=r"rewards\.vowels"):
        lorakit.train(run, resume=True, quiet=True)
