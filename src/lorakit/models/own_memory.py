"""A model's weights in memory of their own, and not as pages of the files that they came from.

safetensors maps files into memory, and a weight whose dtype is the file's stays there. Whoever
writes to such a file changes the model that is being served, and whoever shortens it ends the
process (SIGBUS).
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import chain
from pathlib import Path

import torch
from torch import nn


def take_into_memory(model: nn.Module) -> None:
    """Copies the weights and buffers of `model` that are pages of a file, one after the other."""
    mapped = _mapped_files()
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.device.type == "cpu" and _may_be_in(mapped, tensor):
            tensor.data = tensor.data.clone(memory_format=torch.preserve_format)


def _may_be_in(mapped: list[tuple[int, int]] | None, tensor: torch.Tensor) -> bool:
    if mapped is None:  # unknown: what is an ordinary tensor is copied
        return type(tensor.data) is torch.Tensor
    address = tensor.data_ptr()
    at = bisect_right(mapped, (address, address)) - 1
    return any(begin <= address < end for begin, end in mapped[max(at, 0) : at + 2])


def _mapped_files() -> list[tuple[int, int]] | None:
    """Where files lie in memory, sorted; None where the system does not say (not Linux)."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        place, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0":
            begin, _, end = place.partition("-")
            found.append((int(begin, 16), int(end, 16)))
    return sorted(found)
