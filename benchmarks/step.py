"""One training step: PEFT and lorakit side by side, both with the model's own forward and loss.

    python -m benchmarks.step [--batch 4 --length 256 --dtype bfloat16 --rounds 7]

Each side runs in a process of its own, so that peak memory is its own; the sides take turns, and
medians are compared, because machines are noisy.
"""

import argparse
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
    """Takes turns, prints the table, and last one line of JSON with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=3, help="measured steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["peft", "lorakit"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return

    from rich.console import Console
    from rich.table import Table

    found: dict[str, list[dict[str, float]]] = {"peft": [], "lorakit": []}
    for _ in range(options.rounds):
        for side, rounds in found.items():
            command = [sys.executable, "-m", "benchmarks.step", "--side", side, *sys.argv[1:]]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rounds.append(json.loads(text.splitlines()[-1]))
    median = {
        side: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        for side, rounds in found.items()
    }
    shape = f"{options.batch} × {options.length} tokens, r=16, all-linear, {options.dtype}"
    table = Table(title=f"{shape}, dropout {options.dropout}")
    for heading in ("", "seconds a step", "peak MB"):
        table.add_column(heading, justify="right")
    for side, values in median.items():
        table.add_row(side, f"{values['seconds']:.3f}", f"{values['memory_mb']:.0f}")
    Console().print(table)
    ratios = {
        "speed_ratio": round(median["peft"]["seconds"] / median["lorakit"]["seconds"], 3),
        "memory_ratio": round(median["lorakit"]["memory_mb"] / median["peft"]["memory_mb"], 3),
    }
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
