"""Consoles and pipes whose encoding lacks characters, or whose input is in another one."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lorakit.cli import main
from lorakit.console import decoded, readable

NARROW = ("gbk", "cp1252", "ascii", "cp437", "utf-8")
CHINESE = "把订单改成 JSON：四把绿椅子 😀 é"


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process, with streams of an encoding as Python opens them."""

    def run(encoding: str, *words: str | Path, stdin: bytes = b"") -> Said:
        streams = [io.BytesIO(), io.BytesIO()]
        out, err = (io.TextIOWrapper(raw, encoding=encoding, errors="strict") for raw in streams)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", out)
            patched.setattr(sys, "stderr", err)
            patched.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding=encoding))
            patched.setattr(sys, "argv", ["lorakit", *map(str, words)])
            with pytest.raises(SystemExit) as left:
                main.main()
            out.flush()
            err.flush()
        code = left.value.code
        return Said(int(code or 0), *(raw.getvalue().decode(encoding) for raw in streams))

    return run


@pytest.fixture
def chinese_rows(tmp_path: Path) -> Path:
    path = tmp_path / "订单.jsonl"
    row = {"prompt": CHINESE, "completion": "绿椅子 ✓ ½"}
    path.write_text((json.dumps(row, ensure_ascii=False) + "\n") * 8, encoding="utf-8")
    return path


@pytest.mark.parametrize("encoding", NARROW)
def test_no_character_ends_a_command(
    console, encoding: str, tiny_model: Path, tiny_adapter: Path, chinese_rows: Path
):
    check = console(
        encoding,
        *("check", "--no-forecast", "--model", tiny_model, "--data", chinese_rows, "data.eval=0"),
    )
    assert check.code == 0, check.err
    assert "parameters are trained" in check.out
    assert ("绿椅子" in check.out) == (encoding in ("gbk", "utf-8"))

    inspected = console(encoding, "inspect", tiny_adapter)
    assert inspected.code == 0, inspected.err
    assert "effective rank" in inspected.out

    missing = console(encoding, "inspect", "没有的适配器")
    assert missing.code == 2
    assert "(unexpected" not in missing.err


@pytest.mark.parametrize("encoding", NARROW)
def test_json_on_stdout_is_the_same_value_in_every_encoding(
    console, encoding: str, tiny_adapter: Path, tmp_path: Path
):
    words = ["generate", tiny_adapter, "--prompts", "-", "--max-new-tokens", "2"]
    piped = console(encoding, *words, stdin=f"{CHINESE}\n".encode())
    assert piped.code == 0, piped.err
    assert json.loads(piped.out)["messages"][0]["content"] == CHINESE
    written = console(encoding, *words, "-o", tmp_path / "answers.jsonl", stdin=CHINESE.encode())
    assert written.code == 0
    text = (tmp_path / "answers.jsonl").read_text(encoding="utf-8")
    assert json.loads(text)["messages"] == json.loads(piped.out)["messages"]
    assert CHINESE in text


@pytest.mark.parametrize(
    ("encoding", "piped"),
    [
        ("gbk", "绿椅子".encode("gbk")),
        ("cp1252", "Stühle".encode("cp1252")),
        ("ascii", "绿椅子".encode()),
        ("utf-8", b"\xef\xbb\xbf" + "绿椅子".encode()),
        ("utf-8", "绿椅子".encode("utf-16")),
    ],
)
def test_prompts_come_in_the_encoding_of_the_console_or_in_unicode(
    console, encoding: str, piped: bytes, tiny_adapter: Path
):
    words = ["generate", tiny_adapter, "--prompts", "-", "--max-new-tokens", "1"]
    said = console(encoding, *words, stdin=piped)
    assert said.code == 0, said.err
    assert json.loads(said.out)["messages"][0]["content"] in ("绿椅子", "Stühle")
    chat = console(encoding, "chat", tiny_adapter, "--max-new-tokens", "1", stdin=piped)
    assert chat.code == 0, chat.err


def test_bytes_that_no_encoding_reads_are_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert decoded(b"a\xffb") == "a\ufffdb"
    typed = "绿".encode().decode("ascii", "surrogateescape")  # what a C locale makes of UTF-8
    assert readable(typed) == "绿"
    assert readable("\ud83d") == "?"


def test_a_name_that_is_not_utf8_is_used_or_refused_in_one_line(
    console, tiny_model: Path, tiny_adapter: Path, chinese_rows: Path, tmp_path: Path
):
    name = tmp_path / "run-\udcff"  # the byte 0xff
    named = tmp_path / "adapter-\udcff"
    shutil.copytree(tiny_adapter, named)
    generate = ("generate", tiny_adapter, "--max-new-tokens", "1", "--prompts")
    for code, *words in (
        (2, "train", "--model", tiny_model, "--data", chinese_rows, "--output-dir", name),
        (2, "check", "--model", tiny_model, "--data", name),
        (2, "eval", tiny_adapter, "--data", name),
        (2, *generate, name),
        (0, *generate, "-", "-o", name),
        (0, "generate", named, "--max-new-tokens", "1", "--prompts", "-"),
        (0, "inspect", named),
        (0, "inspect", named, "--json"),
        (0, "report", named),
        (0, "merge", named, "-o", tmp_path / "merged-\udcff"),
        (0, "resize", named, "--rank", "2", "-o", tmp_path / "small-\udcff"),
    ):
        for encoding in ("utf-8", "cp1252"):
            said = console(encoding, *words, stdin=b"hello")
            assert said.code in (code, 2), said.err  # the second time the output may be there
            assert "(unexpected" not in said.err


@pytest.mark.skipif(sys.platform == "win32", reason="names are UTF-16 there")
def test_names_that_an_ascii_locale_cannot_read_are_read_as_utf8(tmp_path: Path):
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    said = subprocess.run(
        [sys.executable, "-m", "lorakit", "train", str(tmp_path / "适配器.yaml")],
        capture_output=True,
        env=os.environ | ascii_alone,
    )
    assert said.returncode == 2
    assert b"\\u9002\\u914d\\u5668" in said.stderr  # the name, and not its bytes
