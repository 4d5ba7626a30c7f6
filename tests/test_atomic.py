"""A kill at any moment leaves the old or the new, never half."""

import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lorakit import atomic
from lorakit.errors import InputError, LorakitError


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "deep" / "file.txt"
    atomic.write_file(path, "old")
    atomic.write_file(path, "neu: ü")
    assert path.read_text(encoding="utf-8") == "neu: ü"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_block_that_fails_leaves_the_old_file_and_no_folder(tmp_path: Path):
    path = tmp_path / "file.txt"
    atomic.write_file(path, "old")

    def fail_in(block: AbstractContextManager[Path], name: str) -> None:
        with block as place:
            (place / name if name else place).write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in(atomic.replacing_file(path), "")
    with pytest.raises(ZeroDivisionError):
        fail_in(atomic.new_folder(tmp_path / "new"), "x")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_is_filled(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with atomic.new_folder(tmp_path / "empty") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "empty" / "x").read_text() == "1"
    with (
        pytest.raises(InputError, match="already exists"),
        atomic.new_folder(tmp_path / "empty") as folder,
    ):
        pass


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_process_killed_while_writing_leaves_the_old_or_nothing(tmp_path: Path, kind: str):
    target = tmp_path / "target"
    ready = tmp_path / "ready"
    body = {
        "file": "with atomic.replacing_file(target) as t: t.write_text('half'); wait()",
        "folder": "with atomic.new_folder(target) as t: (t / 'x').write_text('half'); wait()",
    }[kind]
    code = (
        "import sys, time; from pathlib import Path; from lorakit import atomic\n"
        f"target, ready = Path({str(target)!r}), Path({str(ready)!r})\n"
        "def wait(): ready.touch(); time.sleep(60)\n"
        f"{body}\n"
    )
    if kind == "file":
        target.write_text("old")
    process = subprocess.Popen([sys.executable, "-c", code])
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not target.is_dir()
    if kind == "file":
        assert target.read_text() == "old"


def test_a_full_disk_is_one_line(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    try:
        with pytest.raises(LorakitError, match=r"cannot write .*No space left"):
            atomic.write_file(folder / "file", b"0" * 200_000)
        assert list(folder.iterdir()) == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LorakitError, match="cannot write"):
        atomic.write_file(tmp_path / "file" / "below", "x")
