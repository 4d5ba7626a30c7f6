"""How a batch whose rows have different adapters is multiplied: six ways, on a model's layers.

All linear layers of the bundled model's shape, each with a weight of its own, so that as much is
read from memory as in a step of decoding. Sides take turns in one process; medians.

    python -m benchmarks.mixed [--rows 8] [--r 16] [--dtype bfloat16]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import groupby

import torch
from torch import nn
from torch.nn.functional import grouped_mm, linear

from lorakit import LoraConfig, LoraModel
from lorakit.lora.checkpoint import load_tensors
from lorakit.lora.joining import pack_adapter
from lorakit.lora.routing import Route

BLOCKS = 30
SHAPES = {  # by the input that layers share: (d_out, d_in)
    "qkv": [(576, 576), (192, 576), (192, 576)],
    "o": [(576, 576)],
    "gate_up": [(1536, 576), (1536, 576)],
    "down": [(576, 1536)],
}


class Bench:
    """The layers, an input for each group of them, and the factors of every adapter."""

    def __init__(self, rows: int, r: int, dtype: torch.dtype) -> None:
        self.rows, self.r = rows, r
        self.model = nn.ModuleList(
            nn.ModuleDict(
                {
                    group: nn.ModuleList(nn.Linear(i, o, bias=False) for o, i in shapes)
                    for group, shapes in SHAPES.items()
                }
            )
            for _ in range(BLOCKS)
        ).to(dtype)
        self.model.requires_grad_(False)
        self.layers = [
            (layer, torch.randn(rows, layer.in_features).to(dtype))
            for block in self.model
            for group in block.values()
            for layer in group
        ]
        self.stacks = [
            (
                torch.randn(rows, r, layer.in_features).to(dtype),
                torch.randn(rows, layer.out_features, r).to(dtype),
            )
            for layer, _ in self.layers
        ]
        self.turned = [
            (A.flatten(0, 1).T.contiguous(), B.transpose(1, 2).flatten(0, 1).contiguous())
            for A, B in self.stacks
        ]
        mask = torch.eye(rows, dtype=torch.bool).repeat_interleave(r, dim=1)
        self.hidden = ~mask

    def base(self) -> None:
        for layer, x in self.layers:
            linear(x, layer.weight)

    def one_adapter(self) -> None:
        for (layer, x), (A, B) in zip(self.layers, self.stacks, strict=True):
            linear(x, layer.weight).addmm_(x @ A[0].T, B[0].T)

    def stacked_bmm(self) -> None:
        for (layer, x), (A, B) in zip(self.layers, self.stacks, strict=True):
            y = linear(x, layer.weight)
            y += torch.bmm(torch.bmm(x[:, None], A.mT), B.mT)[:, 0]

    def grouped(self) -> None:
        for (layer, x), (A, B) in zip(self.layers, self.stacks, strict=True):
            y = linear(x, layer.weight)
            for row in range(self.rows):
                y[row : row + 1].addmm_(x[row : row + 1] @ A[row].T, B[row].T)

    def grouped_mm(self) -> None:
        ends = torch.arange(1, self.rows + 1, dtype=torch.int32)
        for (layer, x), (A, B) in zip(self.layers, self.stacks, strict=True):
            y = linear(x, layer.weight)
            y += grouped_mm(grouped_mm(x, A.mT, offs=ends), B.mT, offs=ends)

    def masked_dense(self) -> None:
        for (layer, x), (A, B) in zip(self.layers, self.turned, strict=True):
            inner = (x @ A).masked_fill_(self.hidden, 0)
            linear(x, layer.weight).addmm_(inner, B)


def packed(bench: Bench) -> Callable[[], None]:
    """lorakit's way: masked dense, one product for the weights and B of layers with one input."""
    paths = [path for path, layer in bench.model.named_modules() if isinstance(layer, nn.Linear)]
    families = [list(group) for _, group in groupby(paths, lambda path: path.rpartition(".")[0])]
    bank = LoraModel(bench.model, None)
    config = LoraConfig(r=bench.r, lora_alpha=bench.r, target_modules=list(paths))
    for row in range(bench.rows):
        tensors = {
            f"base_model.model.{path}.lora_{factor}.weight": tensor
            for path, (A, B) in zip(paths, bench.stacks, strict=True)
            for factor, tensor in (("A", A[row]), ("B", B[row]))
        }
        bank.add_adapter(f"row-{row}", config, autocast_adapter_dtype=False)
        load_tensors(bank.adapter_tensors(f"row-{row}"), tensors, f"row-{row}")
    bank.pack(families)
    for name in bank.adapters:
        pack_adapter(bank, name)
    bank.routing.route = Route.of_rows([f"row-{row}" for row in range(bench.rows)])
    inputs = {
        id(group): torch.randn(bench.rows, group[0].in_features).to(group[0].weight.dtype)
        for block in bench.model
        for group in block.values()
    }

    def step() -> None:
        for block in bench.model:
            for group in block.values():
                x = inputs[id(group)]
                for layer in group:
                    layer(x)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(args.rows, args.r, getattr(torch, args.dtype))
    other = Bench(args.rows, args.r, getattr(torch, args.dtype))
    sides: dict[str, Callable[[], None]] = {
        "the base alone": bench.base,
        "one adapter for all rows": bench.one_adapter,
        "stacked bmm": bench.stacked_bmm,
        "grouped, a product a row": bench.grouped,
        "grouped_mm": bench.grouped_mm,
        "masked dense": bench.masked_dense,
        "masked dense, W and B of layers with one input in one product (lorakit)": packed(other),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    with torch.inference_mode():
        for turn in range(args.rounds + 3):
            for name, side in list(sides.items()):
                began = time.perf_counter()
                try:
                    side()
                except (RuntimeError, NotImplementedError) as error:
                    print(f"{name}: {str(error).splitlines()[0]}")
                    del sides[name], times[name]
                    continue
                if turn >= 3:
                    times[name].append(time.perf_counter() - began)
    base = statistics.median(times["the base alone"])
    print(f"| {args.rows} rows, r={args.r}, {args.dtype} | ms | × base |\n| --- | --- | --- |")
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"| {name} | {middle * 1000:.1f} | {middle / base:.2f} |")


if __name__ == "__main__":
    main()
