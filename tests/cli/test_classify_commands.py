"""A classifier from the command line: trained, scored, and kept out of a chat."""

import json
from pathlib import Path

from command import Command
from tiny import save_tiny_encoder


def test_a_classifier_is_trained_scored_and_kept_out_of_a_chat(
    lorakit_command: Command, tmp_path: Path
):
    model = save_tiny_encoder(tmp_path / "encoder")
    texts = [f"{'aab' if i % 3 else 'xyz'} {i}" for i in range(18)]
    rows = [{"review": t, "stars": 1 + (t[0] == "x")} for t in texts]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(
        f"model: {model}\ndtype: float32\n"
        "data: {train: rows.jsonl, eval: rows.jsonl, columns: {text: review, label: stars}}\n"
        "lora: {task_type: SEQ_CLS, r: 4}\n"
        "training: {num_train_epochs: 20, learning_rate: 1e-2}\noutput_dir: run\n"
    )
    done = lorakit_command("train", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    assert "2 labels: 1 (12), 2 (6)" in done.stderr
    assert "held-out accuracy: " in done.stdout
    assert "with the untrained head" in done.stdout

    command = ("eval", "run", "--data", "rows.jsonl", "--json", "scores.json")
    done = lorakit_command(*command, "--metrics", "accuracy,f1")
    assert done.returncode == 0, done.stderr
    assert "always 1" in done.stdout
    assert "precision" in done.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["scores"]["accuracy"]["base"] == 12 / 18
    assert scores["scores"]["accuracy"]["tuned"] > 0.9
    assert scores["predictions"][0]["labels"] == ["2"]
    assert 0.3 < scores["predictions"][0]["confidence"] <= 1

    done = lorakit_command(*command, "--metrics", "acuracy")
    assert done.returncode == 2
    assert "did you mean 'accuracy'" in done.stderr

    done = lorakit_command("chat", "run")
    assert done.returncode == 2
    assert (
        "run is for SEQ_CLS and cannot answer with text: score it with lorakit eval" in done.stderr
    )
