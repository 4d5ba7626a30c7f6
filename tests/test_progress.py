"""Long work says how far it is and when it ends, in a terminal and in a log."""

import io
import re
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from lorakit import progress
from lorakit.cli import main
from lorakit.progress import Task, innermost, showing, task, track

COUNTED = re.compile(r"^(.+): ([\d,]+) of ([\d,]+) \((\d+)%\), (\d+:\d\d)(?: left)?", re.MULTILINE)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines come as soon as they can, so that a test is a second long."""
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "TICK", 0.002)


def log() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_time_left_is_that_of_the_speed_so_far(monkeypatch: pytest.MonkeyPatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    work = Task("resumed", 40, done=20)
    assert work.left is None
    now = 110.0
    work.update(25)
    assert work.left == pytest.approx(30.0)  # 5 in 10 s, 15 are left
    assert work.line == "resumed: 25 of 40 (62%), 0:30 left"
    assert Task("loading").line == "loading: 0:00"


def test_a_log_gets_a_line_after_ten_seconds_and_then_ever_fewer(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    work, lines = Task("long", 10), []
    for now in range(3600):
        if work.due():
            work.said()
            lines.append(now)
    assert lines[:3] == [10, 20, 30]
    assert 20 < len(lines) < 60
    assert max(b - a for a, b in pairwise(lines)) <= 121


def test_a_log_gets_lines_of_the_innermost_task_and_its_end(quick: None):
    console = log()
    with showing(console), task("outer"):
        for _ in track(range(3), "inner"):
            assert innermost().what == "inner"
            time.sleep(0.1)
    found = COUNTED.findall(said(console))
    assert {(name, of) for name, _, of, *_ in found} == {("inner", "3")}
    assert found[-1][1:4] == ("3", "3", "100")


def test_a_terminal_gets_a_bar_that_goes_away(quick: None):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with showing(console):
        before = sys.stdout
        for _ in track(range(3), "merging"):
            assert sys.stdout is before  # what is printed for other programs takes no other way
            time.sleep(0.15)
    assert "merging" in said(console)
    assert re.search(r"[123]/3", said(console))
    assert "merging" not in said(console).rpartition("\x1b[2K")[2]  # the line is erased


def test_nothing_is_shown_without_a_display_or_by_a_quiet_one(
    quick: None, capsys: pytest.CaptureFixture[str]
):
    def work() -> None:
        for _ in track(range(2), "silent"):
            time.sleep(0.05)

    work()
    with showing(log()), showing(Console(quiet=True)):
        work()
    assert capsys.readouterr() == ("", "")


def test_an_error_closes_every_task(quick: None):
    console = log()

    def fail() -> None:
        with task("outer"):
            for _ in track(range(2), "inner"):
                _ = 1 / 0

    with showing(console):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert innermost().what == ""


def questions(count: int) -> str:
    return "".join(f'{{"prompt": "{n} + {n}?", "completion": "{2 * n}"}}\n' for n in range(count))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(questions(12), encoding="utf-8")
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    def command(*words: str | Path) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["lorakit", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main.main()
        out, err = capsys.readouterr()
        assert not left.value.code, err
        return out, err

    return command


def test_every_long_command_says_how_far_it_is(
    quick: None, run: object, tiny_model: Path, rows: Path, tmp_path: Path
):
    adapter = tmp_path / "run"
    model = ("--model", tiny_model, "--data", rows)
    _, err = run("train", *model, "--output-dir", adapter, "training.max_steps=2", "samples=0")
    assert "training" in {entry[0] for entry in COUNTED.findall(err)}

    out, err = run("eval", adapter, "--data", rows, "--max-new-tokens", "2", "--batch-size", "2")
    found = [entry for entry in COUNTED.findall(err) if entry[0] == "evaluating"]
    assert found[-1][1:4] == ("48", "48", "100")  # answers and losses of 12 rows, twice
    assert "evaluating" not in out

    words = ("generate", adapter, "--prompts", rows, "--max-new-tokens", "2", "--max-rows", "1")
    out, err = run(*words)
    assert ("answering", "12", "12") in [entry[:3] for entry in COUNTED.findall(err)]
    assert len(out.splitlines()) == 12

    seen: set[str] = set()
    for number in range(20):  # one merge of a tiny model may be over before a line is due
        _, err = run("merge", adapter, "-o", tmp_path / f"merged{number}")
        seen |= {entry[0] for entry in COUNTED.findall(err)}
        if "merging, in MB" in seen:
            break
    assert "merging, in MB" in seen
    _, err = run("check", *model, "data.eval=0")
    assert "measuring batches for the forecast" in {entry[0] for entry in COUNTED.findall(err)}
    sweep = ("--over", "lora.r=2,4", "training.max_steps=2", "samples=0", "data.eval=0.5")
    rows.write_text(questions(40), encoding="utf-8")
    _, err = run("sweep", *model, *sweep, "--output-dir", tmp_path / "sweep")
    assert "training up to 100%" in {entry[0] for entry in COUNTED.findall(err)}
