"""One output, one writer: the second process is told who the first is, whichever verb it runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.adapters.combine import combine
from lorakit.adapters.export.mlx import export_mlx
from lorakit.adapters.export.vllm import export_vllm
from lorakit.adapters.extract import extract
from lorakit.adapters.merge import merge
from lorakit.adapters.resize import resize
from lorakit.demo.run import run_demo
from lorakit.errors import InputError, LorakitError
from lorakit.folder_lock import LOCK_NAME, locked_folder, reserves
from small_runs import recipe

HOLDER = """
import sys, time
from lorakit.folder_lock import locked_folder, reserves

def wait(output):
    print("held", flush=True)
    time.sleep(600)

if sys.argv[1] == "folder":
    with locked_folder(sys.argv[2], lambda: None):
        wait(sys.argv[2])
else:
    reserves("output")(wait)(sys.argv[2])
"""

Hold = Callable[[str, Path], subprocess.Popen[str]]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that holds a folder, or reserves an output that is not there yet."""
    started = []

    def start(kind: str, path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, kind, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(
    tiny_model: Path, tmp_path: Path, hold: Hold
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n}", "completion": "{n}"}}\n' for n in range(12)))
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=1)
    holder = hold("folder", tmp_path / "run")
    before = (tmp_path / "run" / LOCK_NAME).read_bytes()
    host = os.uname().nodename
    for start in (
        lambda: lorakit.train(values, quiet=True),
        lambda: lorakit.train(values, resume=True, quiet=True),
        lambda: lorakit.sweep(values, over={"lora.r": [2, 4]}, quiet=True),
        lambda: run_demo(tmp_path / "run", print),
    ):
        with pytest.raises(InputError, match=f"process {holder.pid} on {host} since 20"):
            start()
    assert [p.name for p in (tmp_path / "run").iterdir()] == [LOCK_NAME]
    assert (tmp_path / "run" / LOCK_NAME).read_bytes() == before

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_NAME).exists()
    lorakit.train(values, quiet=True)
    assert not (tmp_path / "run" / LOCK_NAME).exists()
    lorakit.train(values, resume=True, quiet=True)


def test_a_sweep_and_a_run_of_its_configuration_exclude_each_other(
    tiny_model: Path, tmp_path: Path, hold: Hold
):
    sweep = hold("folder", tmp_path / "sweep")
    values = recipe(tiny_model, tmp_path, tmp_path / "sweep" / "r4")
    with pytest.raises(InputError, match=f"sweep is being written by process {sweep.pid} "):
        lorakit.train(values, resume=True, quiet=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sweep.json").write_text("{}")
    run = hold("folder", tmp_path / "other" / "r4")
    values["output_dir"] = str(tmp_path / "other")
    with pytest.raises(InputError, match=f"r4 is being written by process {run.pid} "):
        lorakit.sweep(values, over={"lora.r": [2, 4]}, resume=True, quiet=True)


def test_a_copy_of_a_folder_that_is_in_use_is_not_locked(tmp_path: Path, hold: Hold):
    hold("folder", tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with locked_folder(tmp_path / "copy", lambda: None):
        pass
    assert not (tmp_path / "copy" / LOCK_NAME).exists()


def test_every_verb_that_writes_a_new_output_refuses_one_that_is_being_written(
    tmp_path: Path, hold: Hold
):
    output = tmp_path / "new"
    holder = hold("output", output)
    verbs: list[Callable[[], Any]] = [
        lambda: merge("adapter", output),
        lambda: combine(["a", "b"], output, weights=[1, 1]),
        lambda: resize("adapter", output, rank=1),
        lambda: extract("base", "tuned", output),
        lambda: export_mlx("adapter", output),
        lambda: export_vllm("adapter", output),
    ]
    for verb in verbs:
        with pytest.raises(InputError, match=f"is being written by process {holder.pid} "):
            verb()
    assert not output.exists()
    holder.kill()
    holder.wait()
    reserves("output")(lambda output: output.mkdir())(output)
    assert {path.name for path in tmp_path.iterdir()} == {"new"}


def test_a_refused_start_leaves_neither_a_lock_nor_a_folder(tmp_path: Path):
    with pytest.raises(InputError), locked_folder(tmp_path / "a" / "b", lambda: None):
        raise InputError("no such rows")
    assert not (tmp_path / "a").exists()
    occupied = tmp_path / "thesis.txt"
    occupied.write_text("mine")
    with pytest.raises(LorakitError, match="cannot write"):
        reserves("output")(lambda output: None)(occupied / "merged")


def test_who_holds_a_folder_is_named_on_one_line_whatever_its_file_says(tmp_path: Path):
    with locked_folder(tmp_path, lambda: None):
        lock = tmp_path / LOCK_NAME
        holder = {"pid": 1, "host": "a\x1b[31m\nb", "since": "now", "command": "x\u202e"}
        for text, said in ((json.dumps(holder), r"1 on a\x1b[31m b"), ("{", "another process")):
            lock.write_bytes(b"\0" + text.encode())
            with pytest.raises(InputError) as refused:
                lorakit.train(recipe(tmp_path, tmp_path, tmp_path), quiet=True)
            assert str(refused.value).isprintable()
            assert said in str(refused.value)
