"""Small sweeps: configurations of one recipe, their solo runs, and how far they are apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lorakit
from lorakit.models.load import best_device, torch_dtype
from lorakit.sweeps.local import LocalRunner
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.splits import whole_split
from lorakit.sweeps.sweep_base import SweepBase
from lorakit.training.recipe import load_recipe
from lorakit.training.setup import load_inputs
from small_runs import recipe, weights


def configurations(
    values: Mapping[str, Any], folder: Path, changes: Sequence[Mapping[str, Any]]
) -> list[Configuration]:
    """One for each of `changes`, which are dotted keys and values."""
    found = []
    for i, own in enumerate(changes):
        name = f"c{i:02d}"
        complete = load_recipe({**values, "output_dir": str(folder / name)}, own.items())
        found.append(Configuration(name, own, complete))
    return found


def runner_for(values: Mapping[str, Any], **options: Any) -> LocalRunner:
    """A runner whose held-out rows are all in one split."""
    base = load_recipe(values)
    inputs = load_inputs(base, torch_dtype(base.dtype, best_device()))
    held = whole_split(inputs.data.eval, inputs.data.eval_samples)
    return LocalRunner(SweepBase(base, inputs, {"held": held}), **options)


def solo(configuration: Configuration, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that `lorakit train` gives."""
    values = configuration.recipe.to_dict() | {"output_dir": str(folder / configuration.name)}
    return weights(lorakit.train(values, quiet=True).output_dir)


def distance(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between two adapters' numbers, of those of each tensor's size."""
    assert found.keys() == wanted.keys()
    return max(
        float((found[k] - wanted[k]).abs().max() / (1e-3 + wanted[k].abs().max())) for k in wanted
    )


def small(model: Path, rows: Path, folder: Path, **training: Any) -> dict[str, Any]:
    """A recipe whose runs take a second, without evaluations of their own."""
    values = recipe(model, rows, folder, eval_strategy="no", **training)
    # A file of its own, so that no seed decides which rows are held out.
    held_out = rows.with_name("held_out.jsonl")
    held_out.write_text("".join(rows.read_text().splitlines(keepends=True)[::5]))
    values["data"]["eval"] = str(held_out)
    return values | {"samples": 0, "compile": False}
