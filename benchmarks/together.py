"""Several configurations in one batch, beside the same ones one after the other.

    python -m benchmarks.together [--count 8 --batch 4 --steps 3 --rounds 3]

All sides are a sweep's runner on the bundled model; the time is that of whole runs.
"together" measures how much goes through the model at a time, "one pass" is all configurations in
each pass, and the memory of one configuration by itself is what theirs is compared with. Rows are
short, as instructions are.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.turns import Figures, peak_memory_mb, take_turns

SIDES = ("together", "one pass", "in turn", "one alone")
RANKS = (16,)


def write_rows(path: Path, count: int) -> None:
    """Rows of 40 to 90 tokens."""
    draw = random.Random(0)
    words = ["river", "stone", "light", "market", "winter", "garden", "letter", "engine", "silver"]
    with path.open("w") as file:
        for n in range(count):
            text = " ".join(draw.choices(words, k=draw.randint(15, 40)))
            row = {"prompt": f"Describe number {n}: {text}", "completion": text[::-1][:60]}
            file.write(json.dumps(row) + "\n")


def measure(side: str, options: argparse.Namespace) -> Figures:
    """Tokens a second of all runs, whatever belongs to them, and the peak memory in MB."""
    from lorakit.models.load import best_device, torch_dtype
    from lorakit.sweeps.local import LocalRunner
    from lorakit.sweeps.space.configurations import Configuration
    from lorakit.sweeps.sweep_base import SweepBase
    from lorakit.training.machine import settle_in
    from lorakit.training.recipe import load_recipe
    from lorakit.training.setup import load_inputs

    settle_in()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, options.batch * options.steps)
        values = {
            "model": options.model,
            "dtype": options.dtype,
            "data": {"train": str(rows), "eval": 0},
            "training": {
                "per_device_train_batch_size": options.batch,
                "max_steps": options.steps,
                "save_strategy": "no",
            },
            "output_dir": folder,
        }
        configurations = []
        for i in range(1 if side == "one alone" else options.count):
            own = {"lora.r": RANKS[i % len(RANKS)], "output_dir": f"{folder}/c{i}"}
            recipe = load_recipe(values, own.items())
            configurations.append(Configuration(f"c{i}", own, recipe))
        base = load_recipe(values)
        begun = load_inputs(base, torch_dtype(base.dtype, best_device()))
        at_once = {"together": None, "one pass": options.count}.get(side, 1)
        say = partial(print, file=sys.stderr)
        runner = LocalRunner(SweepBase(base, begun, {}), at_once=at_once, say=say)
        began = time.perf_counter()
        runner.advance(configurations, 1.0)
        seconds = time.perf_counter() - began
        tokens = len(configurations) * sum(len(row) for row in begun.data.train)
        return {"tokens_per_second": tokens / seconds, "peak_memory_mb": peak_memory_mb()}


def main() -> None:
    """Measures all sides in turn and shows the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    names = ("model", "dtype", "count", "batch", "steps")
    arguments = [text for n in names for text in (f"--{n}", str(getattr(options, n)))]
    found = take_turns("benchmarks.together", options.sides, arguments, options.rounds)
    table = Table("side", "tokens/s", "peak memory, MB")
    for side, figures in found.items():
        rate, memory = figures["tokens_per_second"], figures["peak_memory_mb"]
        table.add_row(side, f"{rate:.0f}", f"{memory:.0f}")
    Console().print(table)
    ratios = {}
    for side in ("together", "one pass"):
        for other, figure in (("in turn", "tokens_per_second"), ("one alone", "peak_memory_mb")):
            if {side, other} <= found.keys():
                ratio = found[side][figure] / found[other][figure]
                ratios[f"{side}, {figure} against {other}"] = round(ratio, 3)
    print(json.dumps({"benchmark": "together", **vars(options), **ratios}))


if __name__ == "__main__":
    main()
