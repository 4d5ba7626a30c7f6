"""What `lorakit check` forecasts against what the run then takes: time and peak memory.

    python -m benchmarks.forecast --data rows.json

Forecast and run have a process each, one after the other, for several settings. Prints a table
and, last, one line of JSON with the ratios (forecast by truth).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

from rich.console import Console
from rich.table import Table

SETTINGS: dict[str, dict[str, Any]] = {
    "batches of 4": {"per_device_train_batch_size": 4},
    "batches of 2, twice": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"per_device_train_batch_size": 4, "gradient_checkpointing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="rows, in any form that a recipe takes")
    parser.add_argument("--columns", help="as prompt=mr,completion=ref")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--side", choices=["forecast", "run"], help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        values = json.loads(options.recipe)
        print(json.dumps(_forecast(values) if options.side == "forecast" else _run(values)))
        return
    table = Table(title="forecast and truth")
    headings = ("", "steps", "s forecast", "±", "s", "ratio", "MB forecast", "MB", "ratio")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    ratios = []
    for name in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            recipe = _recipe(options, SETTINGS[name], folder)
            expected, truth = (_process(side, recipe) for side in ("forecast", "run"))
        ratio = {k: expected[k] / truth[k] for k in ("seconds", "memory_mb")}
        ratios.append({"setting": name} | {k: round(v, 3) for k, v in ratio.items()})
        table.add_row(
            name,
            str(truth["steps"]),
            *(f"{v:.0f}" for v in (expected["seconds"], expected["error"], truth["seconds"])),
            f"{ratio['seconds']:.2f}",
            *(f"{v:.0f}" for v in (expected["memory_mb"], truth["memory_mb"])),
            f"{ratio['memory_mb']:.2f}",
        )
    Console().print(table)
    print(json.dumps(ratios))


def _recipe(options: argparse.Namespace, training: dict[str, Any], folder: str) -> dict[str, Any]:
    pairs = [pair.split("=") for pair in (options.columns or "").split(",") if pair]
    return {
        "model": options.model,
        "data": {
            "train": options.data,
            "limit": options.rows,
            "max_length": options.length,
            "columns": dict(pairs),
        },
        "training": {"num_train_epochs": 1, "learning_rate": 2e-4, **training},
        "samples": 0,
        "output_dir": f"{folder}/run",
    }


def _process(side: str, recipe: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.forecast", "--data=-", f"--side={side}"]
    done = subprocess.run(
        [*command, f"--recipe={json.dumps(recipe)}"], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _forecast(values: dict[str, Any]) -> dict[str, float]:
    from lorakit.training.check import check
    from lorakit.training.recipe import load_recipe

    expected = check(load_recipe(values)).forecast
    assert expected is not None
    return {
        "seconds": expected.seconds,
        "error": expected.error,
        "memory_mb": expected.peak_memory_mb,
    }


def _run(values: dict[str, Any]) -> dict[str, float]:
    import lorakit

    manifest = lorakit.train(values, quiet=True).manifest
    assert manifest.run_seconds is not None
    return {
        "seconds": manifest.run_seconds,
        "memory_mb": manifest.peak_memory_mb,
        "steps": manifest.steps,
    }


if __name__ == "__main__":
    main()
