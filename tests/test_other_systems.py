"""lorakit where Python lacks what only POSIX systems have, as on Windows.

One process without those modules and functions imports everything, trains a step and chats.
"""

import subprocess
import sys
from pathlib import Path

import pytest

_MODULES = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline", "curses")
_FUNCTIONS = (
    *("fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "setsid", "chown", "fchown"),
    *("fchmod", "lchown", "sched_getaffinity", "sched_setaffinity", "sysconf", "statvfs"),
    *("posix_fadvise", "posix_fallocate", "mkfifo", "getloadavg", "killpg", "uname", "nice"),
)
_SIGNALS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGQUIT", "SIGALRM", "pthread_sigmask")

_SCRIPT = f"""
import importlib, io, os, pkgutil, signal, sys
# The standard library and the packages that have their own ways for Windows are there already.
import asyncio, multiprocessing, subprocess, torch, transformers, transformers.trainer, uvicorn
import accelerate, rich.console, typer, psutil
for name in {_MODULES}:
    sys.modules[name] = None  # an import raises ImportError
for home, names in ((os, {_FUNCTIONS}), (signal, {_SIGNALS})):
    for name in names:
        if hasattr(home, name):
            delattr(home, name)

import lorakit
optional = {{"ray", "vllm"}}
for module in pkgutil.walk_packages(lorakit.__path__, "lorakit."):
    if module.name != "lorakit.__main__":
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            assert error.name in optional, (module.name, error)

model, rows, output = sys.argv[1:]
from lorakit.cli.main import main
def run(*words, stdin=""):
    sys.argv = ["lorakit", *words]
    sys.stdin = io.StringIO(stdin)
    try:
        main()
    except SystemExit as left:
        assert not left.code, (words, left.code)
run("train", "--model", model, "--data", rows, "--output-dir", output,
    "training.max_steps=1", "lora.r=2", "data.eval=0.25")
run("chat", output, "--max-new-tokens", "2", stdin="hello\\n")
run("merge", output, "-o", output + "-merged")
from lorakit.server.options import Limits
from lorakit.server.run import _allow_connections
_allow_connections(Limits())
from lorakit.training import machine
assert machine.memory_mb() > 100 and machine.peak_memory_mb() > 10 and machine.used_memory_mb() > 10
assert machine.available_cores() >= 1
"""


@pytest.mark.exhaustive
def test_without_posix_everything_imports_a_step_is_trained_and_a_chat_answered(
    tiny_model: Path, tmp_path: Path
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "a?", "completion": "b"}\n{"prompt": "c?", "completion": "d"}\n' * 4
    )
    words = [str(tiny_model), str(rows), str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *words], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run-merged" / "model.safetensors").is_file()
