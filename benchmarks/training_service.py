"""The training service beside loops of PEFT, beside itself with one tenant, and beside its engine.

    python -m benchmarks.training_service [--cases tenants wire step memory --rounds 3]

"tenants": several adapters, each a step of 4 rows of 64 tokens at a time: clients at once, one
client after the other on the same server, and PEFT's loops one after the other in one process.
"wire": one adapter, 4,096 tokens a call, over HTTP and in the process (`lorakit.Engine`).
"step": one adapter, 4 rows of 256 tokens, over HTTP and as `lorakit train` computes a step.
"memory": the most resident memory of the server while 8 adapters of rank 32 make steps in turn, and
while one does: what the others' weights and optimizer states take.

The client is the Tinker SDK in a process of its own, on the same cores.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.resident_memory import resident_mb
from benchmarks.turns import Figures, take_turns

CASES = {
    "tenants": ("at once", "in turn", "peft"),
    "wire": ("over the wire", "in process"),
    "step": ("one tenant", "lorakit train"),
    "memory": ("eight", "one"),
}
RATIOS = {
    "tenants": (("at once", "peft"), ("at once", "in turn")),
    "wire": (("over the wire", "in process"),),
    "step": (("one tenant", "lorakit train"),),
    "memory": (("eight", "one"),),
}
ADAM = {"learning_rate": 1e-4, "eps": 1e-8}


# --- the server and its clients -------------------------------------------------------------------


@contextmanager
def serving(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address, and the process's number."""
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "lorakit", "serve", "--model", options.model, "--training"]
        command += ["--state", state, "--port", "0", "--dtype", options.dtype]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as server:
            assert server.stdout
            try:
                for line in server.stdout:
                    if found := re.search(r"http://[\d.]+:\d+", line):
                        break
                else:
                    raise SystemExit("the server does not start")
                threading.Thread(target=server.stdout.read, daemon=True).start()
                yield found[0], server.pid
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(60)


def connected(url: str, key: str = "tml-benchmark") -> Any:
    """A client of the server."""
    os.environ["TINKER_TELEMETRY"] = "0"
    import tinker

    return tinker.ServiceClient(base_url=url, api_key=key)


def rows_of(count: int, length: int, seed: int) -> list[list[int]]:
    """Rows of random tokens."""
    chance = random.Random(seed)
    return [[chance.randrange(5, 40_000) for _ in range(length + 1)] for _ in range(count)]


def datums(rows: list[list[int]]) -> list[Any]:
    """The rows as the SDK has them: the first tokens predict the last."""
    from tinker import types

    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={
                "target_tokens": types.TensorData(data=row[1:], dtype="int64", shape=[len(row) - 1])
            },
        )
        for row in rows
    ]


def tenant(client: Any, options: argparse.Namespace, seed: int) -> Any:
    """A new adapter."""
    return client.create_lora_training_client(
        options.model, rank=options.rank, seed=seed, train_unembed=options.unembed
    ).result()


def steps(run: Any, data: list[Any], count: int) -> None:
    """So many steps, each of which waits for the last."""
    from tinker import types

    for _ in range(count):
        passed = run.forward_backward(data, "cross_entropy")
        stepped = run.optim_step(types.AdamParams(**ADAM))
        passed.result()
        stepped.result()


def in_threads(works: list[Callable[[], None]]) -> None:
    """Does all of them at the same time."""
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- the sides ------------------------------------------------------------------------------------


def of_tenants(side: str, options: argparse.Namespace) -> Figures:
    """Tokens a second of all tenants together."""
    count, n = options.tenants, options.steps
    tokens = count * n * 4 * 64
    data = [rows_of(4, 64, seed) for seed in range(count)]
    if side == "peft":
        return {"tokens_per_second": tokens / peft_loops(data, options)}
    with serving(options) as (url, _), connected(url) as client:
        runs = [tenant(client, options, seed) for seed in range(count)]
        ready = [datums(rows) for rows in data]
        works = [lambda i=i: steps(runs[i], ready[i], n) for i in range(count)]  # type: ignore[misc]
        for i in range(count):
            steps(runs[i], ready[i], 1)
        began = time.perf_counter()
        if side == "at once":
            in_threads(works)
        else:
            for work in works:
                work()
        return {"tokens_per_second": tokens / (time.perf_counter() - began)}


def peft_loops(data: list[list[list[int]]], options: argparse.Namespace) -> float:
    """The seconds of PEFT's steps with one adapter after the other."""
    import peft
    import torch

    import lorakit
    from lorakit.training.machine import settle_in

    settle_in()
    base, _ = lorakit.load_model(options.model, options.dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets += ["lm_head"] if options.unembed else []
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"
    )
    seconds = 0.0
    for rows in data:
        model = peft.get_peft_model(base, config)
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=ADAM["learning_rate"], weight_decay=0.0)
        ids = torch.tensor(rows)
        for step in range(-1, options.steps):
            began = time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.perf_counter() - began if step >= 0 else 0.0
        base = model.unload()
    return seconds


def of_wire(side: str, options: argparse.Namespace) -> Figures:
    """Tokens a second of calls of 4,096 tokens."""
    rows = rows_of(16, 256, 0)
    if side == "in process":
        times = list(engine_steps(rows, options))
    else:
        times = list(service_steps(rows, options))
    return {"tokens_per_second": 16 * 256 / statistics.median(times[2:])}


def service_steps(rows: list[list[int]], options: argparse.Namespace) -> Iterator[float]:
    """The seconds of each step over HTTP."""
    with serving(options) as (url, _), connected(url) as client:
        run, data = tenant(client, options, 0), datums(rows)
        for _ in range(options.steps + 2):
            began = time.perf_counter()
            steps(run, data, 1)
            yield time.perf_counter() - began


def engine_steps(rows: list[list[int]], options: argparse.Namespace) -> Iterator[float]:
    """The seconds of each step of `lorakit.Engine`."""
    import lorakit
    from lorakit.training.machine import settle_in

    settle_in()
    with lorakit.Engine(options.model, dtype=options.dtype) as engine:
        targets = "all-linear"
        config = lorakit.LoraConfig(r=options.rank, lora_alpha=32, target_modules=targets)
        if options.unembed:
            names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            config.target_modules = [*names, "lm_head"]
        engine.create_adapter("one", config)
        made = [engine.row("one", row[:1], row[1:]) for row in rows]
        for _ in range(options.steps + 2):
            began = time.perf_counter()
            engine.forward_backward(made)
            engine.optim_step("one", **ADAM)
            yield time.perf_counter() - began


def of_step(side: str, options: argparse.Namespace) -> Figures:
    """Tokens a second of steps of 4 rows of 256 tokens."""
    rows = rows_of(4, 256, 0)
    if side == "lorakit train":
        times = list(train_steps(rows, options))
    else:
        times = list(service_steps(rows, options))
    return {"tokens_per_second": 4 * 256 / statistics.median(times[2:])}


def train_steps(rows: list[list[int]], options: argparse.Namespace) -> Iterator[float]:
    """The seconds of each step as `lorakit train` computes it."""
    import torch

    import lorakit
    from lorakit.data.batches import LineCollator
    from lorakit.data.masking import TokenizedRow
    from lorakit.models.fused import fused
    from lorakit.models.lines import take_lines
    from lorakit.models.loss import SupervisedLoss
    from lorakit.training.machine import settle_in

    settle_in()
    base, _ = lorakit.load_model(options.model, options.dtype)
    targets: Any = "all-linear"
    if options.unembed:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        targets += ["lm_head"]
    config = lorakit.LoraConfig(r=options.rank, lora_alpha=32, target_modules=targets)
    model = lorakit.get_peft_model(base, config)
    if reason := take_lines(model):
        raise SystemExit(reason)
    batch = LineCollator()([TokenizedRow(row, row, "") for row in rows])
    loss = SupervisedLoss(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    with fused(model):
        for _ in range(options.steps + 2):
            began = time.perf_counter()
            loss(model, batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            yield time.perf_counter() - began


def of_memory(side: str, options: argparse.Namespace) -> Figures:
    """The most resident memory of the server while its tenants make steps, in MB."""
    count = options.tenants if side == "eight" else 1
    with serving(options) as (url, process), connected(url) as client:
        runs = [tenant(client, options, seed) for seed in range(count)]
        data = [datums(rows_of(4, 64, seed)) for seed in range(count)]
        most, ended = [resident_mb(process)], threading.Event()

        def watch() -> None:
            while not ended.wait(0.05):
                most[0] = max(most[0], resident_mb(process))

        watcher = threading.Thread(target=watch)
        watcher.start()
        for run, rows in zip(runs, data, strict=True):
            steps(run, rows, 3)
        ended.set()
        watcher.join()
        return {"memory_mb": most[0]}


MEASURED = {"tenants": of_tenants, "wire": of_wire, "step": of_step, "memory": of_memory}


# --- what is shown --------------------------------------------------------------------------------


def main() -> None:
    """Measures the cases, prints a table, and last one line of JSON with the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--tenants", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--unembed", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=5, help="measured steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        [case] = options.cases
        print(json.dumps(MEASURED[case](options.side, options)))
        return
    names = ("model", "dtype", "tenants", "rank", "steps")
    arguments = [f"--{name}={getattr(options, name)}" for name in names]
    arguments.append("--unembed" if options.unembed else "--no-unembed")
    table = Table("case", "side", "figure", "value")
    ratios: dict[str, Any] = {}
    for case in options.cases:
        own = [*arguments, f"--cases={case}"]
        found = take_turns("benchmarks.training_service", CASES[case], own, options.rounds)
        for side, figures in found.items():
            for name, value in figures.items():
                table.add_row(case, side, name, f"{value:.0f}")
        for side, other in RATIOS[case]:
            [name] = found[side]
            ratio = found[side][name] / found[other][name]
            ratios[f"{case}: {side} against {other}"] = round(ratio, 3)
    Console().print(table)
    print(json.dumps({"benchmark": "training_service", **vars(options), **ratios}))


if __name__ == "__main__":
    main()
