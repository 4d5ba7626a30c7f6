"""`lorakit check`: what a new user sees before training, and that nothing is written."""

from pathlib import Path

from command import Command


def test_rows_numbers_findings_parameters_and_a_forecast_are_shown_and_nothing_is_written(
    lorakit_command: Command, tiny_model: Path, tmp_path: Path
):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "{n} + {n}?", "completion": "是{2 * n}"}}\n' for n in range(20))
        + '{"prompt": "1 + 1?", "completion": "是2"}\n{"prompt": "long", "completion": "'
        + "x" * 200
        + '"}\n'
    )
    before = sorted(tmp_path.iterdir())
    done = lorakit_command(
        *("check", "--model", tiny_model, "--data", path, "--show", "2"),
        *("data.max_length=60", "lora.r=4", "training.max_steps=5"),
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "⟦是0<|im_end|>⟧" in out
    assert "<|im_start|>user↵" in out
    assert "! 1 of 22 rows is longer than max_length 60 and cut at the end" in out
    assert "✓ no row is without an answer's text" in out
    assert "q_proj" in out
    assert "trained" in out
    assert "chosen: lora.lora_alpha=8: twice the rank" in out
    assert "forecast: 5 steps and 2 evaluations in" in out
    assert sorted(tmp_path.iterdir()) == before


def test_a_control_character_in_a_row_does_nothing_to_the_terminal(
    lorakit_command: Command, tiny_model: Path, tmp_path: Path
):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a\\u001b[31mred", "completion": "b"}\n')
    done = lorakit_command(
        *("check", "--model", tiny_model, "--data", path, "--no-forecast", "data.eval=0"),
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "\\x1b[31mred" in done.stdout


def test_a_recipe_that_cannot_be_used_is_refused_as_by_train(
    lorakit_command: Command, tiny_model: Path, rows: Path
):
    done = lorakit_command("check", "--model", tiny_model, "--data", rows, "lora.rank=3")
    assert done.returncode == 2
    assert "lora.rank is not a recipe key" in done.stderr
    assert done.stdout == ""
