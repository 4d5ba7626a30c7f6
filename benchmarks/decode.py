"""A decoding step of the bundled model: in C++ and by PyTorch, beside reading the weights once.

Both sides have one process and take turns; each step adds a token to each row, behind prompts of 37
to 44 tokens. Reading these prompts is compared too.

    python -m benchmarks.decode [--rows 1 8 32] [--rank 16] [--weights int8] [--rounds 20]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import lorakit
from lorakit.engine.cache import row_cache
from lorakit.engine.native.library import library
from lorakit.engine.resident import ResidentModel
from lorakit.lora.routing import BASE, Route
from lorakit.models.bundled import ALIAS
from lorakit.models.rounding import WEIGHTS, stored_as

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = 8


def milliseconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def made(rank: int, weights: str | None) -> ResidentModel:
    """The bundled model with adapters `0` to `7`, of random factors."""
    model, _ = lorakit.load_model(ALIAS, "bfloat16")
    resident = ResidentModel(stored_as(model.eval(), weights), stays_wrapped=True)
    resident.pack()
    for i in range(ADAPTERS):
        resident.create(str(i), lorakit.LoraConfig(r=rank, target_modules=TARGETS), i)
        for tensor in resident.trained(str(i)).values():
            tensor.data.normal_(std=0.02)
    resident.pack(map(str, range(ADAPTERS)))
    return resident


@torch.inference_mode()
def step_times(resident: ResidentModel, names: list[str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round's step by each side."""
    step, packed, base = resident.carried.step, resident.model.packed, resident.base
    assert step is not None
    count, native = len(names), step.native
    cache = row_cache(base, rows=count, length=64 + rounds)
    prompts = prompts_of(count)
    by_model(resident, names, cache.whole_prompts(0, prompts, base.device))
    route = Route.of_rows(names, (count, 1))
    found: dict[str, list[float]] = {"C++": [], "PyTorch": []}
    for turn in range(rounds + 2):  # the first two warm up, and compare
        lengths = [len(prompt) + turn for prompt in prompts]
        for side, times in found.items():
            step.native = native if side == "C++" else None
            given = cache.newest_tokens([11] * count, lengths, base.device)
            assert step.serves(route, packed)
            spent = milliseconds(lambda given=given: step(cache, given, route, packed))
            if turn > 1:
                times.append(spent)
    step.native = native
    return found


def prompts_of(rows: int) -> list[list[int]]:
    return [list(range(5, 42 + i % 8)) for i in range(rows)]


def by_model(resident: ResidentModel, names: list[str], given: dict[str, Any]) -> None:
    """Prompts by the model's own modules."""
    resident.model.routing.route = Route.of_rows(names, tuple(given["input_ids"].shape))
    forward: Any = resident.base
    forward(**given, logits_to_keep=1)


@torch.inference_mode()
def prompt_times(resident: ResidentModel, names: list[str], rounds: int) -> dict[str, list[float]]:
    """As `step_times`, of reading the prompts."""
    step, packed, base = resident.carried.step, resident.model.packed, resident.base
    assert step is not None
    prompts = prompts_of(len(names))
    cache = row_cache(base, rows=len(names), length=64)
    found: dict[str, list[float]] = {"C++": [], "PyTorch": []}
    for turn in range(rounds + 2):
        for side, times in found.items():
            given = cache.whole_prompts(0, prompts, base.device)
            route = Route.of_rows(names, tuple(given["input_ids"].shape))
            assert step.serves(route, packed)
            if side == "C++":
                spent = milliseconds(partial(step.of_prompts, cache, given, route, packed))
            else:
                spent = milliseconds(partial(by_model, resident, names, given))
            if turn > 1:
                times.append(spent)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--weights", choices=WEIGHTS)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if library().functions is None:
        parser.error(library().why_not)
    resident = made(args.rank, args.weights)
    linear = [
        module.weight
        for name, module in resident.base.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name
    ]
    size = sum(weight.nbytes for weight in linear)
    lies = torch.ones(size // 4, dtype=torch.int32)
    read = statistics.median(milliseconds(lies.max) for _ in range(5))
    print(f"reading {size / 1e6:.0f} MB: {read:.1f} ms, {torch.get_num_threads()} threads\n")
    print("| rows | PyTorch, ms | C++, ms (least) | ratio of medians |\n| --- | --- | --- | --- |")
    ratios = {}
    for rows in args.rows:
        for title, names in (
            ("the base", [BASE] * rows),
            ("one adapter", ["0"] * rows),
            (f"{ADAPTERS} adapters", [str(i % ADAPTERS) for i in range(rows)]),
        ):
            if rows == 1 and title.startswith(str(ADAPTERS)):
                continue
            for kind, measure in ((title, step_times), (f"{title}, prompts", prompt_times)):
                times = measure(resident, names, args.rounds)
                slow, fast = (statistics.median(times[side]) for side in ("PyTorch", "C++"))
                label = f"{rows}, {kind}"
                ratios[label] = round(slow / fast, 2)
                least = min(times["C++"])
                print(f"| {label} | {slow:.1f} | {fast:.1f} ({least:.1f}) | {slow / fast:.2f} |")
    print(json.dumps({"threads": torch.get_num_threads(), "ratios": ratios}))


if __name__ == "__main__":
    main()
