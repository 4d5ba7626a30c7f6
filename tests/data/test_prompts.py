"""Prompts of plain lines and of rows, with or without the answers that training needs."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.data.prompts import read_prompts
from lorakit.errors import InputError

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be brief"}


def rows(folder: Path, *values: dict[str, Any]) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return str(file)


def test_a_text_file_and_the_standard_input_have_a_prompt_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "some.txt").write_text("\ufeffhi\n\n  三国 \n")
    prompts = read_prompts(str(tmp_path / "some.txt"))
    assert [p.messages for p in prompts] == [(USER,), ({"role": "user", "content": "三国"},)]
    assert prompts[1].where.endswith("some.txt:3")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert read_prompts("-")[0].messages == (USER,)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "hi"}, [USER]),
        ({"prompt": "hi", "system": "be brief"}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"prompt": "hi", "completion": "ho"}, [USER]),
        ({"instruction": "hi", "output": "ho"}, [USER]),
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [USER, REPLY]}, [USER]),
        ({"messages": [USER, REPLY, USER]}, [USER, REPLY, USER]),
        ({"conversations": [{"from": "human", "value": "hi"}]}, [USER]),
    ],
)
def test_a_row_asks_what_stands_before_its_answer(
    tmp_path: Path, row: dict[str, Any], messages: list[dict[str, str]]
):
    (prompt,) = read_prompts(rows(tmp_path, row))
    assert list(prompt.messages) == messages


def test_columns_of_other_names_and_a_system_message_for_those_without(tmp_path: Path):
    file = rows(tmp_path, {"mr": "hi", "ref": "ho"})
    (prompt,) = read_prompts(file, {"prompt": "mr", "completion": "ref"})
    assert prompt.opened_by("be brief").messages == (SYSTEM, USER)
    assert prompt.opened_by("be brief").opened_by("or not").messages == (SYSTEM, USER)
    assert prompt.opened_by(None) is prompt


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "once"}, "plain text has no prompt"),
        ({"messages": [REPLY]}, "no message is left to answer"),
        ({"prompt": 3}, "'prompt'"),
        ({"prompt": ""}, "'prompt'"),
        ({"question": "hi"}, "fit no format"),
    ],
)
def test_a_row_that_asks_nothing_is_refused_with_its_place(
    tmp_path: Path, row: dict[str, Any], words: str
):
    with pytest.raises(InputError, match=rf"prompts\.jsonl:2: .*{words}"):
        read_prompts(rows(tmp_path, {"prompt": "hi"}, row))


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, words in (("empty.txt", "no prompt"), ("bytes.txt", "cannot be"), ("no.txt", "no")):
        with pytest.raises(InputError, match=rf"{name.removesuffix('.txt')}\.txt .*{words}"):
            read_prompts(str(tmp_path / name))
