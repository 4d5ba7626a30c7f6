"""Compiling the blocks that a model repeats, where the time that it saves is more than it takes.

One block's code serves all of them, for every length of batch. Attention within rows stays
outside (`models/row_attention.py`): how a line is divided differs from batch to batch.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lorakit.errors import InputError
from lorakit.lora.parameters import count_parameters
from lorakit.models.loaded import base_model

if TYPE_CHECKING:
    from torch import nn

Choice = bool | Literal["auto"]

PAYS_FROM = {
    ("cpu", "float32"): 5e13,
    ("cpu", "bfloat16"): 5e13,
    ("cuda", "float32"): 2e16,
    ("cuda", "bfloat16"): 2e16,
    ("cuda", "float16"): 2e16,
}
"""FLOP of a run from which on compiling saves twice what it takes (docs/performance.md).

Fixed, as a resumed run on a busier machine must choose again what it chose.
"""


def run_flops(model: nn.Module, tokens: float) -> float:
    """The FLOP of training on `tokens`: 2 a parameter forwards, 2 for the input's gradient."""
    return 4.0 * count_parameters(model)[1] * tokens


def choose(choice: Choice, model: nn.Module, tokens: float) -> tuple[bool, str]:
    """Whether to compile, and what to say about it (nothing for the common case).

    Args:
        choice: the recipe's.
        tokens: those of the whole run.

    Raises:
        InputError: compiling is asked for and cannot be done.
    """
    weight = next(model.parameters())
    device, dtype = weight.device.type, str(weight.dtype).removeprefix("torch.")
    pays_from = PAYS_FROM.get((device, dtype), float("inf"))
    if choice is False or (choice == "auto" and run_flops(model, tokens) < pays_from):
        return False, ""
    if obstacle := _obstacle(model, device):
        if choice is True:
            raise InputError(f"compile: {obstacle}")
        return False, f"not compiled, although this run is long enough to gain by it: {obstacle}"
    return True, "the model's blocks are compiled in the first step"


def compile_blocks(model: nn.Module) -> None:
    """Compiles the repeated blocks of `model` in place; that happens when they first run.

    The first block is left alone: its input needs no gradient, so it would be compiled apart.
    """
    from lorakit.models.row_attention import compile_around

    compile_around()
    for block in _blocks(model)[1:]:
        block.compile(dynamic=True)


def _obstacle(model: nn.Module, device: str) -> str | None:
    if getattr(base_model(model), "hf_quantizer", None) is not None:
        return "the base is quantised"
    if len(_blocks(model)) < 2:
        return f"{type(base_model(model)).__name__} says of no module that it is a repeated block"
    if device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        return "there is no C++ compiler (g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are missing (Debian's python3-dev)"
    if device == "cuda" and not find_spec("triton"):
        return "Triton is not installed"
    return None


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that transformers says are repeated and never split."""
    names = set(getattr(base_model(model), "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]
