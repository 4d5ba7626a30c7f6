"""`lorakit generate`: every prompt by every adapter, in order, as rows that can be read again."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from answered import generate_answers
from command import Command, run_lorakit
from lorakit.adapters.open import open_adapter
from lorakit.data.prompts import read_prompts
from random_adapters import make_adapter

ASKED = ["hello", "a longer question about something", "three"]


@pytest.fixture
def generate(tmp_path: Path) -> Command:
    options = ["--dtype", "float32", "--max-new-tokens", "6"]
    return partial(run_lorakit, tmp_path, "generate", *options)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    file = tmp_path / "asked.txt"
    file.write_text("".join(f"{line}\n" for line in ASKED))
    return file


def alone(adapter: Path) -> list[str]:
    opened = open_adapter(adapter, dtype="float32")
    prompts = [[{"role": "user", "content": text}] for text in ASKED]
    return generate_answers(opened.model, opened.tokenizer, prompts, max_new_tokens=6)


def test_every_prompt_is_answered_by_every_adapter_and_the_base(
    generate: Command, adapters: dict[str, Path], base: Path, asked: Path, tmp_path: Path
):
    output = tmp_path / "answers.jsonl"
    named = [f"{name}={adapters[name]}" for name in ("poet", "few")]
    done = generate(*named, "--with-base", "--prompts", asked, "-o", output)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["model"] for row in rows] == ["poet", "few", str(base)] * 3
    assert [row["messages"][0]["content"] for row in rows[::3]] == ASKED
    for at, name in enumerate(("poet", "few")):
        assert [row["messages"][-1]["content"] for row in rows[at::3]] == alone(adapters[name])
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert f"9 answers, {sum(row['new_tokens'] for row in rows)} tokens in " in done.stderr
    assert [p.messages[0]["content"] for p in read_prompts(str(output))[::3]] == ASKED


def test_answers_go_to_the_standard_output_and_prompts_come_from_the_input(
    generate: Command, adapters: dict[str, Path]
):
    done = generate(adapters["shop"], "--prompts", "-", stdin="hello\n\nagain\n")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["hello", "again"]


def test_an_adapter_that_stands_beside_no_others_is_merged_with_a_notice(
    generate: Command, base: Path, asked: Path, tmp_path: Path
):
    layers = make_adapter(base, tmp_path / "layers", layer_replication=[[0, 2], [1, 2]])
    done = generate(layers, "--prompts", asked)
    assert "(layer_replication), so it is merged into the base" in done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == alone(layers)
    assert {row["model"] for row in rows} == {"layers"}
    refused = generate(layers, "--with-base", "--prompts", asked)
    assert refused.returncode == 2
    assert "cannot be served beside other adapters" in refused.stderr


def test_what_cannot_be_answered_is_one_line_and_writes_nothing(
    generate: Command, adapters: dict[str, Path], asked: Path, tmp_path: Path
):
    output = tmp_path / "answers.jsonl"
    long = tmp_path / "long.txt"
    long.write_text(f"fine\n{'x' * 600}\n")
    for arguments, words in (
        (["--prompts", asked], "nothing to answer with"),
        ([adapters["shop"], "--prompts", tmp_path / "none.txt"], "none.txt"),
        ([adapters["shop"], "--prompts", long], r"long.txt:2: the prompt has 6"),
        (["nowhere", "--prompts", asked], "nowhere is not a folder"),
        ([adapters["shop"], "--prompts", asked, "--stop", ""], "stop must not hold"),
    ):
        done = generate(*arguments, "-o", output)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert not output.exists()


def test_answers_follow_the_schema_in_a_file(
    generate: Command, adapters: dict[str, Path], asked: Path, tmp_path: Path
):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["a", "b"]}')
    done = generate(adapters["shop"], "--with-base", "--prompts", asked, "--schema", schema)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["messages"][-1]["content"] for row in rows} <= {'"a"', '"b"'}
    for wrong in ('{"type": "strin"}', "[]", "{", '{"uniqueItems": true}'):
        schema.write_text(wrong)
        done = generate(adapters["shop"], "--prompts", asked, "--schema", schema)
        assert (done.returncode, done.stdout) == (2, ""), wrong
        assert "Traceback" not in done.stderr
