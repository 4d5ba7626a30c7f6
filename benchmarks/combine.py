"""How long it takes to combine eight adapters of the bundled model, by every method.

    python -m benchmarks.combine [--adapters 8] [--rank 16]

The adapters are random, of rank 16 on all linear layers, and lie on the disk; each method writes
its result there too. A table, and last one JSON line with the seconds.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

import lorakit
from lorakit.adapters.combine import METHODS, combine
from lorakit.lora import LoraModel
from lorakit.models.bundled import ALIAS
from lorakit.models.names import resolve
from lorakit.models.skeleton import skeleton

DENSITY = 0.2


def make(folder: Path, count: int, rank: int, base: str = ALIAS) -> list[Path]:
    """Writes random adapters that fit a base, which is never loaded.

    Those that are there already stay as they are.
    """
    config = lorakit.LoraConfig(
        r=rank, target_modules="all-linear", task_type="CAUSAL_LM", base_model_name_or_path=base
    )
    model = LoraModel(skeleton(resolve(base).path), config, initialize=False)
    made = [folder / f"a{seed}" for seed in range(count)]
    for seed, path in enumerate(made):
        if path.is_dir():
            continue
        torch.manual_seed(seed)
        for tensor in model.adapter_tensors("default").values():
            values = torch.nn.Parameter(torch.randn(tensor.shape) * 0.02)
            torch.utils.swap_tensors(tensor, values)
        model.save_pretrained(path)
    return made


def main() -> None:
    """Makes the adapters, times every method, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters = make(folder, arguments.adapters, arguments.rank)
        print(
            f"{arguments.adapters} adapters, r={arguments.rank}; {torch.get_num_threads()} threads"
        )
        for method in METHODS:
            density = None if method in ("linear", "cat", "svd") else DENSITY
            began = time.perf_counter()
            report = combine(
                adapters,
                folder / method,
                weights=[1 / len(adapters)] * len(adapters),
                method=method,
                density=density,
            )
            seconds[method] = round(time.perf_counter() - began, 2)
            ranks = sorted({rank for kind in report.kinds for rank in kind.ranks})
            print(f"{method:16} {seconds[method]:6.2f} s   rank {ranks}   lost {report.lost:.3%}")
    print(
        json.dumps({"benchmark": "combine", "seconds": seconds, "slowest": max(seconds.values())})
    )


if __name__ == "__main__":
    main()
