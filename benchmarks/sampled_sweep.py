"""Configurations of GRPO that sample together, beside the same ones trained one after the other.

    python -m benchmarks.sampled_sweep [--betas 0 0.02 0.05 0.1 --steps 4 --rounds 3]

Both sides hold one base in one process; loading it is not timed, held-out prompts are. Each step
has `--prompts` prompts with `--generations` completions of up to `--length` tokens.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.turns import Figures, take_turns

SIDES = ("together", "in turn")
MODEL = "smollm2-135m-instruct"
REWARD = """
def digits(completions, **columns):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]
"""


def write_rows(path: Path, count: int, first: int) -> str:
    """Prompts of their own."""
    rows = [{"prompt": f"What is {n} + {3 * n}? Answer with a number."} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[first:]))
    return str(path)


def recipe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What all configurations have in common."""
    (folder / "rewards.py").write_text(REWARD)
    return {
        "model": options.model,
        "dtype": options.dtype,
        "data": {
            "train": write_rows(folder / "train.jsonl", 40, 0),
            "eval": write_rows(folder / "eval.jsonl", 60, 52),
        },
        "lora": {"r": 16, "lora_alpha": 32},
        "training": {
            "max_steps": options.steps,
            "learning_rate": 1e-4,
            "per_device_train_batch_size": options.prompts,
            "eval_strategy": "no",
        },
        "objective": {
            "type": "grpo",
            "num_generations": options.generations,
            "max_completion_length": options.length,
            "rewards": [f"{folder / 'rewards.py'}:digits"],
        },
        "samples": 0,
        "compile": False,
        "output_dir": str(folder / "base"),
    }


def measure(options: argparse.Namespace) -> Figures:
    """The seconds of all configurations on one side."""
    from lorakit.models.load import best_device, torch_dtype
    from lorakit.sweeps.local import LocalRunner
    from lorakit.sweeps.space.configurations import Configuration
    from lorakit.sweeps.splits import whole_split
    from lorakit.sweeps.sweep_base import SweepBase
    from lorakit.training.recipe import load_recipe
    from lorakit.training.setup import load_inputs

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        values = recipe(options, folder)
        base = load_recipe(values)
        inputs = load_inputs(base, torch_dtype(base.dtype, best_device(), training=True))
        held = whole_split(inputs.data.eval, inputs.data.eval_samples)
        runner = LocalRunner(
            SweepBase(base, inputs, {"held": held}), together=options.side == "together"
        )
        sweep = []
        for i, beta in enumerate(options.betas):
            changes = {"objective.beta": beta}
            own = load_recipe({**values, "output_dir": str(folder / f"c{i}")}, changes.items())
            sweep.append(Configuration(f"c{i}", changes, own))
        began = time.perf_counter()
        found = runner.advance(sweep, 1.0)
        seconds = time.perf_counter() - began
        assert all(one.step == options.steps for one in found.values())
        inputs.objective.close()
    return {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options)))
        return
    names = ("model", "dtype", "steps", "prompts", "generations", "length")
    arguments = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
    arguments += ["--betas", *map(str, options.betas)]
    found = take_turns("benchmarks.sampled_sweep", SIDES, arguments, options.rounds)
    ratio = found["in turn"]["seconds"] / found["together"]["seconds"]
    for side, figures in found.items():
        print(f"{side}: {figures['seconds']:.1f} s")
    print(json.dumps({"sides": found, "ratio": round(ratio, 2)}))


if __name__ == "__main__":
    main()
