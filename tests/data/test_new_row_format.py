"""A new form of rows is one `RowFormat` and one registered line; training needs nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorakit.cli.main import app
from lorakit.data import formats
from lorakit.data.conversations import Message, exchange, string
from lorakit.data.samples import RowFormat
from lorakit.data.sources import Row
from lorakit.errors import InputError


def read_quiz(row: Row) -> list[Message]:
    """A question with its choices, and the number of the right one."""
    choices = row.values["choices"]
    asked = string(row, row.values["stem"], "'stem'")
    return exchange(f"{asked}\n{', '.join(choices)}", choices[row.values["right"]])


def test_a_registered_row_format_is_trained_with(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quiz = RowFormat(("stem", "choices", "right"), read_quiz)
    monkeypatch.setattr(formats, "FORMATS", [*formats.FORMATS, quiz])
    rows = [{"stem": f"{n} + {n}?", "choices": [str(n), str(2 * n)], "right": 1} for n in range(8)]
    (tmp_path / "quiz.json").write_text(json.dumps(rows))
    given = [f"--model={tiny_model}", f"--data={tmp_path / 'quiz.json'}", "training.max_steps=1"]
    run = CliRunner().invoke(app, ["train", *given, f"output_dir={tmp_path / 'run'}"])
    assert run.exit_code == 0, run.exception
    record: dict[str, Any] = json.loads((tmp_path / "run" / "lorakit.json").read_text())
    assert record["data"][0]["rows"] == 8
    prompt = json.loads((tmp_path / "run" / "samples.json").read_text())[0]["prompt"]
    assert "?\n" in prompt[-1]["content"]


def test_rows_of_a_kind_are_read_for_objectives_that_take_it_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    pairs = RowFormat(
        ("stem", "left", "right"),
        lambda row: (row.values["left"], row.values["right"]),
        kind="comparison",
    )
    monkeypatch.setattr(formats, "FORMATS", [*formats.FORMATS, pairs])
    row = Row({"stem": "q", "left": "a", "right": "b"}, Path("rows.jsonl"), 1)
    assert formats.to_sample(row, kinds=("comparison",)) == ("a", "b")
    with pytest.raises(InputError, match="fit no format"):
        formats.to_sample(row)
