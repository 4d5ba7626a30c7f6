"""A script is asked in a process of its own, which ends when a reply is late."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from lorakit.data.script_process import ScriptProcess
from lorakit.errors import LorakitError

SCRIPT = """
import sys, time
print(*sys.argv[1:], flush=True)
for line in sys.stdin:
    if line == "sleep\\n":
        time.sleep(60)
    if line == "leave\\n":
        sys.exit()
    print(line.upper(), end="", flush=True)
"""


def line(pipe: IO[bytes]) -> bytes | None:
    found = pipe.readline()
    return found if found.endswith(b"\n") else None


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ScriptProcess]:
    (tmp_path / "script.py").write_text(SCRIPT)
    made = ScriptProcess(tmp_path / "script.py", ["jinja2"], "shouts", line)
    yield made
    made.end()


def test_requests_are_answered_one_after_the_other(process: ScriptProcess):
    assert process.ask(lambda pipe: pipe.write(b"a\n"), 30) == b"A\n"
    assert process.ask(lambda pipe: pipe.write(b"b\n"), 30) == b"B\n"
    assert process.alive()


@pytest.mark.parametrize(
    ("request_", "seconds", "error"), [(b"sleep\n", 0.2, TimeoutError), (b"leave\n", 30, EOFError)]
)
def test_a_process_that_is_late_or_leaves_has_ended(
    process: ScriptProcess, request_: bytes, seconds: float, error: type[Exception]
):
    with pytest.raises(error):
        process.ask(lambda pipe: pipe.write(request_), seconds)
    assert not process.alive()


def test_a_request_that_cannot_be_sent_ends_it(process: ScriptProcess):
    with pytest.raises(KeyError):
        process.ask(lambda pipe: {}["missing"], 30)
    assert not process.alive()


def test_a_script_that_does_not_start_is_one_line(tmp_path: Path):
    (tmp_path / "script.py").write_text("raise SystemExit(3)")
    with pytest.raises(LorakitError, match="the process that shouts did not start"):
        ScriptProcess(tmp_path / "script.py", [], "shouts", line)
