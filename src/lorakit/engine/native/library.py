"""Compiles `decode_step.cpp` for the processor at hand, once, and loads it.

The library lies in `LORAKIT_HOME/native`, by a hash of the source and of what the compiler knows of
the processor; one that is there is read from a folder that cannot be written to, too. The first
process that needs it waits some seconds for it, so that the same request has the same answer from
the first token on. Where there is no compiler (`CXX`, with options if it has any, else g++), or it
fails, everything is computed by PyTorch. `LORAKIT_NATIVE=0` leaves it out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from lorakit.atomic import replacing_file
from lorakit.errors import LorakitError, first_line
from lorakit.models.bundled import home, usable_folder

_NAMES = ("decode_step.cpp", "products.h", "four_bits.h")
_SOURCES = [Path(__file__).parent / name for name in _NAMES]
_FLAGS = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-march=native"]  # as fast as -O3
_FLAGS += ["-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno"]


class Library:
    """The compiled functions, which are made if they are not there yet.

    Attributes:
        functions: None where there are none.
        why_not: why there are none.
    """

    def __init__(self) -> None:
        self.functions: ctypes.CDLL | None = None
        self.why_not = ""
        try:
            self.functions = _loaded()
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip() or f"{error.cmd[0]} ended with {error.returncode}"
            self.why_not = f"the C++ compiler failed: {first_line(LorakitError(said))}"
        except (OSError, LorakitError, subprocess.SubprocessError) as error:
            self.why_not = first_line(error)


@cache
def library() -> Library:
    """The process's only one."""
    return Library()


def _loaded() -> ctypes.CDLL:
    """The compiled library, which is made where it is missing, or damaged.

    Raises:
        OSError: there is no compiler, it is turned off, or the library cannot be loaded.
        CalledProcessError: the compiler failed.
        LorakitError: the library cannot be written.
    """
    if os.environ.get("LORAKIT_NATIVE") == "0":
        raise OSError("LORAKIT_NATIVE is 0")
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if not (compiler and shutil.which(compiler[0])):
        raise OSError(f"there is no C++ compiler ({' '.join(compiler)}): install g++, or set CXX")
    name = f"decode_step-{_key(compiler)}.so"
    with suppress(OSError):
        return ctypes.CDLL(str(home() / "native" / name))
    path = usable_folder("native") / name
    _compile(compiler, path)
    return ctypes.CDLL(str(path))


def _key(compiler: Sequence[str]) -> str:
    """Which machines and sources a library is for: the folder may be shared by several machines."""
    # The compiler's version, and the processor's instructions.
    known = _run(*compiler, "-march=native", "-fopenmp", "-dM", "-E", "-x", "c++", os.devnull)
    parts = [known, " ".join(_FLAGS), *platform.libc_ver()]
    parts += [path.read_text("utf-8") for path in _SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: Sequence[str], path: Path) -> None:
    with replacing_file(path) as made:
        compiled = made.with_suffix(".o")
        try:
            _run(*compiler, *_FLAGS, "-c", str(_SOURCES[0]), "-o", str(compiled))
            # Without OpenMP's own library: PyTorch has loaded one, whose threads are shared.
            _run(*compiler, "-shared", str(compiled), "-o", str(made))
        finally:
            compiled.unlink(missing_ok=True)


def _run(*command: str) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=300
    )
    return done.stdout
