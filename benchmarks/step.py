"""One training step: PEFT and lorakit side by side, both with the model's own forward and loss.

    python -m benchmarks.step [--batch 4 --length 256 --dtypes bfloat16 --dropouts 0 --rounds 7]

Each side runs in a process of its own, so that peak memory is its own; the sides take turns, and
medians are compared, because machines are noisy.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time

MODEL = "smollm2-135m-instruct"


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """The median seconds of a step (forward, backward, AdamW) and the peak memory in MB."""
    import torch

    import lorakit

    model, _ = lorakit.load_model(MODEL, options.dtype)
    fields = {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": "all-linear",
        "lora_dropout": options.dropout,
    }
    if side == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**fields, task_type="CAUSAL_LM"))
    else:
        model = lorakit.get_peft_model(model, lorakit.LoraConfig(**fields))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    torch.manual_seed(0)
    ids = torch.randint(0, 49152, (options.batch, options.length), device=model.device)
    seconds = []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 1e6
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"seconds": statistics.median(seconds[1:]), "memory_mb": memory}


def main() -> None:
    """Takes turns, prints a table, and last one line of JSON with the ratios of each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--steps", type=int, default=3, help="measured steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["peft", "lorakit"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        options.dtype, options.dropout = options.dtypes[0], options.dropouts[0]
        print(json.dumps(measure(options.side, options)))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{options.batch} × {options.length} tokens, r=16, all-linear")
    for heading in ("dtype", "dropout", "PEFT s", "lorakit s", "speed", "PEFT MB", "lorakit MB"):
        table.add_column(heading, justify="right")
    table.add_column("memory", justify="right")
    results = []
    for dtype, dropout in itertools.product(options.dtypes, options.dropouts):
        median = compare(dtype, dropout, options)
        (peft, own) = (median["peft"], median["lorakit"])
        speed = peft["seconds"] / own["seconds"]
        memory = own["memory_mb"] / peft["memory_mb"]
        figures = [f"{peft['seconds']:.3f}", f"{own['seconds']:.3f}", f"{speed:.2f}×"]
        figures += [f"{peft['memory_mb']:.0f}", f"{own['memory_mb']:.0f}", f"{memory:.2f}×"]
        table.add_row(dtype, str(dropout), *figures)
        case = {"dtype": dtype, "dropout": dropout}
        ratios = {"speed_ratio": round(speed, 3), "memory_ratio": round(memory, 3)}
        results.append(case | ratios)
    Console(width=100).print(table)
    print(json.dumps(results))


def compare(dtype: str, dropout: float, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The medians of both sides, which take turns."""
    found: dict[str, list[dict[str, float]]] = {"peft": [], "lorakit": []}
    sizes = [f"--{name}={getattr(options, name)}" for name in ("batch", "length", "steps")]
    case = [f"--dtypes={dtype}", f"--dropouts={dropout}"]
    for _ in range(options.rounds):
        for side, rounds in found.items():
            command = [sys.executable, "-m", "benchmarks.step", "--side", side, *case, *sizes]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rounds.append(json.loads(text.splitlines()[-1]))
    return {
        side: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for side, rounds in found.items()
    }


if __name__ == "__main__":
    main()
