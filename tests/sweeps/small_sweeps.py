"""Recipes of sweeps that take seconds, on rows of which something can be learned."""

import json
import random
from pathlib import Path
from typing import Any

from small_runs import recipe


def sayings(path: Path, count: int = 96) -> Path:
    """Rows with prompts of their own, and three different answers."""
    draw = random.Random(0)
    with path.open("w") as file:
        for i in range(count):
            word = draw.choice(["ab", "cd", "ef"])
            file.write(json.dumps({"prompt": f"say {word} {i}", "completion": word * 4}) + "\n")
    return path


def sweep_recipe(model: Path, folder: Path, output: str = "sweep", **training: Any) -> Any:
    """27 steps on 64 of 96 rows; the others are held out."""
    rows = sayings(folder / "sayings.jsonl")
    values = recipe(
        model, rows, folder / output, **{"max_steps": 27, "learning_rate": 3e-2} | training
    )
    values["data"]["eval"] = 1 / 3
    return values
