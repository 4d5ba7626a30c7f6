"""What GRPO adds to a short supervised fine-tuning, on the tasks of `lorakit demo --rl`.

    python -m benchmarks.rl_tasks --task orders --seeds 1 2 3 --steps 60
    python -m benchmarks.rl_tasks --task addition --seeds 1 2 3

Each seed has rows, an initialisation and an order of its own: some steps of supervised fine-tuning,
then GRPO on other prompts. Exact match is of greedy answers to held-out prompts, before GRPO and
after, each with the 95% interval of the share of one seed; the last line has the mean over seeds
and the interval of the rise (Student's t over seeds).
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5% quantile of Student's t for so many seeds."""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The demo's result, in this process."""
    from lorakit.demo.rl_tasks import TASKS
    from lorakit.demo.run_rl import run_rl_demo

    task = TASKS[options.task]
    if options.steps:
        task = replace(task, rl={**task.rl, "max_steps": options.steps})
    with tempfile.TemporaryDirectory() as place:
        found = run_rl_demo(
            Path(place, "demo"),
            lambda text: print(text, file=sys.stderr),
            task=task,
            seed=options.seed,
            held_out_rows=options.held_out,
            overrides=options.set,
        )
    return asdict(found)


def main() -> None:
    """Runs each seed in a process of its own, prints a line when it ends, then a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="orders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, help="of GRPO; by default the demo's")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of the recipe of GRPO")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seed is not None:
        print(json.dumps(measure(options)))
        return
    table = Table(title=f"{options.task}: exact match before and after GRPO")
    for heading in ("seed", "before", "", "after", "", "seconds"):
        table.add_column(heading, justify="right")
    results = []
    for seed in options.seeds:
        case = ["--task", options.task, "--held-out", str(options.held_out), "--seed", str(seed)]
        case += ["--steps", str(options.steps)] if options.steps else []
        command = [sys.executable, "-m", "benchmarks.rl_tasks", *case, "--set", *options.set]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"seed {seed} failed")
        one = json.loads(done.stdout.splitlines()[-1])
        results.append(one)
        ends = ["{:.2f} … {:.2f}".format(*one[f"{when}_interval"]) for when in ("before", "after")]
        shown = (f"{one['before']:.2f}", ends[0], f"{one['after']:.2f}", ends[1])
        row = (str(seed), *shown, f"{one['seconds']:.0f}")
        table.add_row(*row)
        print("seed {}: {} ({}) to {} ({}), {} s".format(*row), flush=True)
    Console().print(table)
    rises = [one["after"] - one["before"] for one in results]
    summary = {"before": statistics.mean(one["before"] for one in results)}
    summary |= {"after": statistics.mean(one["after"] for one in results)}
    summary["rise"] = statistics.mean(rises)
    if (n := len(rises)) in T_95:
        summary["rise_half_interval"] = T_95[n] * statistics.stdev(rises) / math.sqrt(n)
    print(json.dumps({"task": options.task, **summary, "seeds": results}))


if __name__ == "__main__":
    main()
