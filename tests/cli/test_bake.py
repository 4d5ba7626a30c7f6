"""`lorakit bake`: a prompt becomes an adapter, and how near it comes is measured and bounded."""

import json
from pathlib import Path

import pytest

from command import run_lorakit
from small_runs import lines


@pytest.fixture
def given(attentive_folder: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "policy.md").write_text("Answer as a pirate does, and be brief.\n")
    (tmp_path / "questions.txt").write_text("".join(f"Where is island {n}?\n" for n in range(15)))
    return [
        "bake",
        f"--system={tmp_path / 'policy.md'}",
        f"--prompts={tmp_path / 'questions.txt'}",
        "-o",
        str(tmp_path / "run"),
        f"--model={attentive_folder}",
        "--max-new-tokens=8",
        "--answers=1",
        "dtype=float32",
        "training.max_steps=20",
        "training.learning_rate=0.01",
    ]


def test_a_prompt_becomes_an_adapter_that_is_measured(given: list[str], tmp_path: Path):
    done = run_lorakit(tmp_path, *given, "--max-kl=100")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "bake.json").read_text())
    assert found["kl"]["mean"] < found["kl_before"]["mean"]
    assert found["closed"] == pytest.approx(1 - found["kl"]["mean"] / found["kl_before"]["mean"])
    assert found["kl"]["low"] <= found["kl"]["mean"] <= found["kl"]["high"]
    assert (found["questions"], found["held_out"]) == (12, 3)
    assert found["tokens_saved"] > 5
    answers = lines(tmp_path / "run" / "answers.jsonl")
    assert len(answers) == 15
    assert all(row["messages"][-1]["role"] == "assistant" for row in answers)
    record = json.loads((tmp_path / "run" / "lorakit.json").read_text())
    assert record["recipe"]["objective"]["system"] == "Answer as a pirate does, and be brief."
    assert record["eval_scores"]["kl"] == pytest.approx(found["kl"]["mean"], rel=1e-4)


def test_an_adapter_that_is_too_far_off_fails(given: list[str], tmp_path: Path):
    done = run_lorakit(tmp_path, *given, "--max-kl=0", "training.max_steps=1")
    assert done.returncode == 1
    assert "max-kl" in done.stderr
    assert (tmp_path / "run" / "bake.json").is_file()


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("policy.md", " \n", "policy.md"),
        ("questions.txt", "One?\nTwo?\n", "5"),
        ("questions.txt", "", "questions.txt"),
    ],
)
def test_what_cannot_be_baked_is_named(
    given: list[str], tmp_path: Path, file: str, text: str, named: str
):
    (tmp_path / file).write_text(text)
    done = run_lorakit(tmp_path, *given)
    assert done.returncode == 2
    assert named in done.stderr
    assert not (tmp_path / "run").exists()
