"""`lorakit eval` with rewards: an adapter beside its base, and two adapters beside each other."""

import json
import shutil
from pathlib import Path

import pytest

import lorakit
from command import Command

ROWS = [{"prompt": f"Say {n}", "n": n} for n in range(8)]
REWARDS = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
def vowels(completions, **kwargs):
    return [text.count("a") / 8 for text in completions]
"""


@pytest.fixture(scope="module")
def trained(attentive_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of reinforcement learning with a built-in reward and one of a file."""
    folder = tmp_path_factory.mktemp("rewarded")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    lorakit.train(
        {
            "model": str(attentive_folder),
            "dtype": "float32",
            "data": {"train": str(folder / "rows.jsonl"), "eval": 0.25},
            "lora": {"r": 4},
            "objective": {
                "type": "grpo",
                "num_generations": 4,
                "max_completion_length": 6,
                "rewards": [f"{folder}/rewards.py:vowels", {"regex": "a"}],
            },
            "training": {"max_steps": 20, "learning_rate": 2e-2},
            "samples": 0,
            "output_dir": str(folder / "run"),
        },
        quiet=True,
    )
    (folder / "rewards.ran").unlink()
    return folder


def test_the_built_in_rewards_of_a_record_are_scored_and_its_files_are_not_run(
    trained: Path, lorakit_command: Command, tmp_path: Path
):
    (tmp_path / "elsewhere").mkdir()
    done = lorakit_command(
        *("eval", trained / "run", "--data", trained / "rows.jsonl", "--json", "out.json"),
        *("--max-new-tokens", "6", "--samples", "2", "--temperature", "1"),
    )
    assert done.returncode == 0, done.stderr
    assert not (trained / "rewards.ran").exists()
    assert "--rewards" in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["models"] == ["base", "tuned"]
    assert found["prompts"] == 8
    (regex,) = found["rewards"]
    assert regex["name"] == "regex"
    base, tuned = regex["means"]["base"], regex["means"]["tuned"]
    assert regex["difference"]["mean"] == pytest.approx(tuned["mean"] - base["mean"])
    assert base["low"] <= base["mean"] <= base["high"]
    assert len(found["completions"]) == 2 * 2 * 8


def test_named_rewards_are_run_and_an_adapter_is_compared_with_another(
    trained: Path, lorakit_command: Command, tmp_path: Path
):
    shutil.copytree(trained / "run", tmp_path / "copy")
    done = lorakit_command(
        *("eval", trained / "run", "--data", trained / "rows.jsonl", "--json", "out.json"),
        *("--rewards", f"{trained}/rewards.py", "--rewards", "json", "--max-new-tokens", "4"),
        *("--against", "copy"),
    )
    assert done.returncode == 0, done.stderr
    assert (trained / "rewards.ran").exists()
    found = json.loads((tmp_path / "out.json").read_text())
    assert [one["name"] for one in found["rewards"]] == ["vowels", "json", "reward"]
    for one in found["rewards"]:
        assert one["difference"] == {"mean": 0, "low": 0, "high": 0}


def test_what_cannot_be_compared_is_one_line(trained: Path, lorakit_command: Command):
    rows = trained / "rows.jsonl"
    for arguments, said in (
        (("--rewards", "nowhere.py:f"), "nowhere.py"),
        (("--rewards", "{exact_match: answer}"), "needs the column answer"),
        (("--rewards", "json", "--against", "nowhere"), "nowhere"),
        (("--rewards", "json", "--against", str(trained / "run")), "the same adapter"),
    ):
        done = lorakit_command("eval", trained / "run", "--data", rows, *arguments)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr.splitlines()[-1]
