"""`lorakit sweep` as a person runs it: its table, its page, and one line for what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command import Command
from sweeps.small_sweeps import sayings


def recipe_in(folder: Path, model: Path, *lines: str) -> Path:
    rows = sayings(folder / "sayings.jsonl")
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {model}\ndtype: float32\ndata: {{train: {rows}, eval: 0.34}}\n"
        "lora: {lora_alpha: 8}\n"
        "training: {max_steps: 9, logging_steps: 1, learning_rate: 3.0e-2}\n"
        "samples: 0\noutput_dir: runs/sweep\n" + "\n".join(lines) + "\n"
    )
    return path


def test_a_sweep_is_shown_as_a_table_and_its_winner_can_be_trained_and_used(
    lorakit_command: Command, tiny_model: Path, tmp_path: Path
):
    block = "sweep: {over: {training.learning_rate: [1.0e-4, 3.0e-2]}, selection: 0.6}"
    recipe = recipe_in(tmp_path, tiny_model, block)
    done = lorakit_command("sweep", recipe, "lora.lora_dropout=0.1", "--over", "lora.r=2,4")
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "runs/sweep/leaderboard.json").read_text())
    assert len(table["configurations"]) == 4
    assert table["rows"] == {"train": 63, "selection": 20, "report": 13}
    for row in table["configurations"]:
        assert row["name"] in done.stdout
    assert table["verdict"] in done.stdout
    assert f"winner: runs/sweep/{table['winner']}; table: runs/sweep/sweep.html" in done.stdout
    assert "configurations train at once; up to" in done.stderr
    page = (tmp_path / "runs/sweep/sweep.html").read_text()
    assert table["winner"] in page
    assert "http:" not in page
    assert "<script" not in page
    again = lorakit_command("train", "runs/sweep/recipe.yaml")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / f"runs/sweep-{table['winner']}/adapter_model.safetensors").is_file()
    evaluated = lorakit_command(
        *("eval", f"runs/sweep/{table['winner']}", "--data", tmp_path / "sayings.jsonl"),
        *("--max-new-tokens", "2"),
    )
    assert evaluated.returncode == 0, evaluated.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["nothing is swept", "--over lora.r=4,8,16"]),
        (["--over", "training.learning_rat=1"], ["did you mean 'learning_rate'?"]),
        (["--over", "lora.r=4,4"], ["lora.r has 4 twice: its configurations are the same"]),
        (["--over", "lora.r=4,8", "--objective", "blue"], ["did you mean 'bleu'?"]),
        (["--over", "lora.r=4,8", "data.eval=0.05"], ["too few to tell settings apart"]),
        (["--over", "lora.target_modules=[q_porj]"], ["'q_porj' matches no module", "'q_proj'"]),
    ],
)
def test_what_cannot_be_swept_is_one_line_and_leaves_nothing(
    lorakit_command: Command,
    tiny_model: Path,
    tmp_path: Path,
    arguments: list[str],
    words: list[str],
):
    recipe = recipe_in(tmp_path, tiny_model)
    done = lorakit_command("sweep", recipe, *arguments)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line
    assert not (tmp_path / "runs").exists()


def test_a_sweep_block_is_not_lorakit_trains(
    lorakit_command: Command, tiny_model: Path, tmp_path: Path
):
    recipe = recipe_in(tmp_path, tiny_model, "sweep: {over: {lora.r: [2]}}")
    done = lorakit_command("train", recipe)
    assert done.returncode == 2
    assert "the sweep block is for lorakit sweep" in done.stderr


@pytest.mark.exhaustive
def test_a_signal_stops_it_and_resume_goes_on(
    lorakit_command: Command, tiny_model: Path, tmp_path: Path
):
    words = ["sweep", str(recipe_in(tmp_path, tiny_model)), "--over", "lora.r=2,4,8"]
    steps = ["training.max_steps=3000", "--no-prune"]
    command = [sys.executable, "-m", "lorakit", *words, *steps]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "runs/sweep/r8/metrics.jsonl").is_file():
            assert time.monotonic() < deadline
            assert run.poll() is None
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGTERM)  # SIGINT is ignored behind a shell's &
        assert run.wait(120) == 130
    finally:
        run.kill()
    assert "Traceback" not in (run.stderr.read() if run.stderr else "")
    assert list((tmp_path / "runs/sweep").glob("*/checkpoint-*"))
    again = lorakit_command(*words, *steps)
    assert again.returncode == 2
    assert "holds an unfinished sweep: add --resume" in again.stderr
    refused = lorakit_command(*words, "training.max_steps=30", "--resume")
    assert refused.returncode == 2
    assert "cannot be resumed with other values" in refused.stderr
    shutil.rmtree(tmp_path / "runs")
