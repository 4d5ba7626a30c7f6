"""Compiles `decode_step.cpp` for the processor at hand, once, and loads it.

The library lies in `LORAKIT_HOME/native`, by a hash of the source and of what the compiler knows of
the processor. The first process that needs it waits some seconds for it, so that the same request
has the same answer from the first token on. Where there is no compiler (`CXX`, else g++), or it
fails, everything is computed by PyTorch. `LORAKIT_NATIVE=0` leaves it out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from lorakit.atomic import replacing_file
from lorakit.errors import LorakitError, first_line
from lorakit.models.bundled import usable_folder

_SOURCES = [Path(__file__).parent / name for name in ("decode_step.cpp", "products.h")]
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
            self.functions = ctypes.CDLL(str(_compiled()))
        except subprocess.CalledProcessError as error:
            self.why_not = f"the C++ compiler failed: {first_line(LorakitError(error.stderr))}"
        except (OSError, LorakitError, subprocess.SubprocessError) as error:
            self.why_not = first_line(error)


@cache
def library() -> Library:
    """The process's only one."""
    return Library()


def _compiled() -> Path:
    """The path of the compiled library, which is made if it is not there yet.

    Raises:
        OSError: there is no compiler, or it is turned off.
        CalledProcessError: the compiler failed.
        LorakitError: the library cannot be written.
    """
    if os.environ.get("LORAKIT_NATIVE") == "0":
        raise OSError("LORAKIT_NATIVE is 0")
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        raise OSError("there is no C++ compiler")
    # Its version, and the processor's instructions: the folder may be shared by several machines.
    known = _run(compiler, "-march=native", "-fopenmp", "-dM", "-E", "-x", "c++", os.devnull)
    parts = [known, " ".join(_FLAGS), *(path.read_text("utf-8") for path in _SOURCES)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = usable_folder("native") / f"decode_step-{name}.so"
    if not path.exists():
        with replacing_file(path) as made:
            compiled = made.with_suffix(".o")
            try:
                _run(compiler, *_FLAGS, "-c", str(_SOURCES[0]), "-o", str(compiled))
                # Without OpenMP's own library: PyTorch has loaded one, whose threads are shared.
                _run(compiler, "-shared", str(compiled), "-o", str(made))
            finally:
                compiled.unlink(missing_ok=True)
    return path


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
