"""Recipes of runs that take a second, and what such a run leaves."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def save_sums(path: Path) -> Path:
    """48 short sums, of different lengths."""
    lines = [
        f'{{"prompt": "{"what is " * (n % 4)}{n} + {n}?", "completion": "{2 * n}"}}'
        for n in range(48)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(model: Path, rows: Path, output: Path, **training: Any) -> dict[str, Any]:
    """Six steps, without sample answers: they take as long as the rest."""
    return {
        "model": str(model),
        "dtype": "float32",
        "data": {"train": str(rows), "eval": 0.25},
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2} | training,
        "samples": 0,
        "output_dir": str(output),
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
