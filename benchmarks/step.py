"""One training step: PEFT with the model's own loss, beside lorakit as `lorakit train` runs it.

    python -m benchmarks.step [--batch 4 --length 256 --dtypes bfloat16 --dropouts 0 --rounds 7]
    python -m benchmarks.step --quantization nf4 --dtypes bfloat16 --dropouts 0

Forward, backward, AdamW; lorakit also with compiled blocks, and both with activation
checkpointing. Beside a quantised base (bitsandbytes on both sides) PEFT has its
`prepare_model_for_kbit_training`, and nothing is compiled.
"share of peak" is the time that the products of a frozen base need at the fastest product measured
in the same process (4 FLOP a parameter and token), by the time taken.
"""

import argparse
import itertools
import json
import statistics
import time
from contextlib import ExitStack

from rich.console import Console
from rich.table import Table

from benchmarks.turns import Figures, matmul_flops, peak_memory_mb, synchronize, take_turns

SIDES = ("peft", "lorakit", "compiled", "peft, checkpointed", "checkpointed")
FIELDS = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def measure(side: str, options: argparse.Namespace) -> Figures:
    """The median seconds of a step, the peak memory in MB, the share of the matmul peak."""
    import torch

    import lorakit
    from lorakit.lora.parameters import numbers_in

    [dtype], [dropout] = options.dtypes, options.dropouts
    until_the_end = ExitStack()
    model, _ = lorakit.load_model(options.model, dtype, quantization=options.quantization)
    torch.manual_seed(0)
    rows = torch.randint(0, model.config.vocab_size, (options.batch, options.length))
    fields = {**FIELDS, "lora_dropout": dropout}
    if side.startswith("peft"):
        import peft

        checkpointed = "checkpointed" in side
        if options.quantization:
            model = peft.prepare_model_for_kbit_training(model, checkpointed)
        elif checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model = peft.get_peft_model(model, peft.LoraConfig(**fields, task_type="CAUSAL_LM"))
        ids = rows.to(model.device)

        def loss() -> torch.Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss
    else:
        from lorakit.data.batches import LineCollator
        from lorakit.data.masking import TokenizedRow
        from lorakit.models.fused import fused
        from lorakit.models.lines import take_lines
        from lorakit.models.loss import SupervisedLoss
        from lorakit.training.compiling import compile_blocks
        from lorakit.training.machine import settle_in

        settle_in()
        model = lorakit.get_peft_model(model, lorakit.LoraConfig(**fields))
        if reason := take_lines(model):
            raise SystemExit(reason)
        line = LineCollator()([TokenizedRow(ids, ids, "") for ids in rows.tolist()])
        batch = {name: tensor.to(model.device) for name, tensor in line.items()}
        supervised_loss = SupervisedLoss(model)
        if side == "checkpointed":
            model.get_base_model().gradient_checkpointing_enable()
        if side == "compiled":
            compile_blocks(model)
        else:
            # Held as long as this function runs: dropped, it would undo itself at once.
            until_the_end.enter_context(fused(model))

        def loss() -> torch.Tensor:
            total, count = supervised_loss(model, batch)
            return total / count

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    seconds = []
    for _ in range(options.steps + 2):
        began = time.perf_counter()
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - began)
    median, memory = statistics.median(seconds[2:]), peak_memory_mb()
    parameters = sum(numbers_in(p) for p in model.parameters() if not p.requires_grad)
    floor = 4 * parameters * rows.numel() / matmul_flops(dtype)
    return {
        "seconds": median,
        "memory_mb": memory,
        "share_of_peak": floor / median,
        "first_two_steps": sum(seconds[:2]),
    }


def main() -> None:
    """Takes turns, prints a table, and last one line of JSON with the ratios of each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--quantization", choices=("nf4", "fp4", "int8"))
    parser.add_argument("--steps", type=int, default=3, help="measured steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return

    sides = options.sides or [s for s in SIDES if not (options.quantization and s == "compiled")]
    kind = f", {options.quantization}" if options.quantization else ""
    table = Table(title=f"{options.batch} × {options.length} tokens, r=16, all-linear{kind}")
    headings = ("dtype", "dropout", "", "s a step", "speed", "MB", "memory", "share of peak")
    for heading in headings:
        table.add_column(heading, justify="right")
    results = []
    for dtype, dropout in itertools.product(options.dtypes, options.dropouts):
        sizes = [f"--{n}={getattr(options, n)}" for n in ("model", "batch", "length", "steps")]
        case = [f"--dtypes={dtype}", f"--dropouts={dropout}", *sizes]
        if options.quantization:
            case.append(f"--quantization={options.quantization}")
        found = take_turns("benchmarks.step", sides, case, options.rounds)
        first = found[sides[0]]
        for side, figures in found.items():
            speed = first["seconds"] / figures["seconds"]
            memory = figures["memory_mb"] / first["memory_mb"]
            cells = (f"{figures['seconds']:.3f}", f"{speed:.2f}×", f"{figures['memory_mb']:.0f}")
            share = f"{figures['share_of_peak']:.2f}"
            table.add_row(dtype, str(dropout), side, *cells, f"{memory:.2f}×", share)
            ratios = {"speed_ratio": round(speed, 3), "memory_ratio": round(memory, 3)}
            results.append({"dtype": dtype, "dropout": dropout, "side": side} | ratios)
    Console(width=100).print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
