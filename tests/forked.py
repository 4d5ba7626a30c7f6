"""Processes of their own that have everything imported when they begin.

They are forks of a process that imports once and does nothing else: `python -m lorakit` would take
seconds to import, each time.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_IMPORTS = [
    "lorakit.cli.train",
    "lorakit.engine.open_engine",
    "lorakit.server.run",
    "lorakit.server.training.routes",
    "lorakit.training.run",
    "lorakit.training.setup",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
]

_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTS)


def forked(work: Callable[..., object], *arguments: Any) -> Any:
    """A `multiprocessing.Process` that has been started, and ends when this process does.

    Args:
        work: a function that has a name in its module.
    """
    process = _context.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def forked_lorakit(words: Sequence[str | Path], err: Path) -> Any:
    """The command with these words; what it says on standard error is in the file `err`."""
    return forked(_lorakit, [*map(str, words)], str(err))


def _lorakit(words: list[str], err: str) -> None:
    from lorakit.cli.main import main

    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # As a terminal starts it; a shell behind `&` may have this process ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["lorakit", *words]
    main()
