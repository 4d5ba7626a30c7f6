"""Rows take memory as they fill, also in a process that keeps freed memory for tensors to come."""

from pathlib import Path
from typing import Any

import torch

from forked import forked
from lorakit.engine.row_layers.full import FullRows
from lorakit.training.machine import keep_freed_memory, used_memory_mb

ROWS, LENGTH, HEADS, D = 4, 2048, 4, 512


def test_rows_leave_kept_memory_to_tensors_that_fill_it(tmp_path: Path):
    found = tmp_path / "grown"
    process = forked(grow, str(found))
    process.join(60)
    assert process.exitcode == 0
    both = 2 * ROWS * HEADS * LENGTH * D * 4
    assert int(found.read_text()) < both / 4


def grow(found: str) -> None:
    """Writes by how many bytes this process grows with a layer's rows between like tensors."""
    keep_freed_memory()
    layer: Any = FullRows(ROWS, LENGTH)
    ones = torch.ones(ROWS, HEADS, 8, D)
    full = [torch.ones(ROWS * HEADS * LENGTH * D) for _ in range(2)]
    before = used_memory_mb()
    full.clear()
    layer.place.prompts = [8] * ROWS
    layer.update(ones, ones)
    # Somewhat smaller, as small blocks have come to lie between.
    full += [torch.ones(ROWS * HEADS * LENGTH * D * 3 // 4) for _ in range(2)]
    assert bool((layer.keys[:, :, :8] == 1).all())
    assert not layer.keys[:, :, 8:16].any()
    Path(found).write_text(str(round(1e6 * (used_memory_mb() - before))))
