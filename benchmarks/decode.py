"""A decoding step of the bundled model: in C++ and by PyTorch, beside reading the weights once.

All sides have one process and take turns; each step adds a token to each row, behind prompts of 37
to 44 tokens. Reading these prompts is compared too. Several forms of weights are sides of one run.

    python -m benchmarks.decode [--rows 1 8 32] [--rank 16] [--weights int8 int4] [--rounds 20]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import lorakit
from lorakit.engine.cache import row_cache
from lorakit.engine.native.library import library
from lorakit.engine.resident import ResidentModel
from lorakit.lora.routing import BASE, Route
from lorakit.models.bundled import ALIAS
from lorakit.models.quantization.rounded_linear import RoundedWeight
from lorakit.models.rounding import WEIGHTS, stored_as

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = 8
PLAIN = "bfloat16"


def milliseconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def made(rank: int, weights: str) -> ResidentModel:
    """The bundled model with adapters `0` to `7`, of random factors."""
    model, _ = lorakit.load_model(ALIAS, "bfloat16")
    stored = stored_as(model.eval(), None if weights == PLAIN else weights)
    resident = ResidentModel(stored, stays_wrapped=True)
    resident.pack()
    for i in range(ADAPTERS):
        resident.create(str(i), lorakit.LoraConfig(r=rank, target_modules=TARGETS), i)
        for tensor in resident.trained(str(i)).values():
            tensor.data.normal_(std=0.02)
    resident.pack(map(str, range(ADAPTERS)))
    return resident


def bytes_read(resident: ResidentModel) -> int:
    """The size of all linear layers' weights, with the scales of those that are rounded."""
    linear: list[Any] = [
        module.weight
        for name, module in resident.base.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name
    ]
    scales = [weight.scales for weight in linear if isinstance(weight, RoundedWeight)]
    return sum(tensor.nbytes for tensor in [*linear, *scales])


def prompts_of(rows: int) -> list[list[int]]:
    return [list(range(5, 42 + i % 8)) for i in range(rows)]


def by_model(resident: ResidentModel, names: list[str], given: dict[str, Any]) -> None:
    """Prompts by the model's own modules."""
    resident.model.routing.route = Route.of_rows(names, tuple(given["input_ids"].shape))
    forward: Any = resident.base
    forward(**given, logits_to_keep=1)


Side = Callable[[int, str], float]
"""Makes turn `i` in C++ or by PyTorch; returns the milliseconds that it took."""


def stepping(resident: ResidentModel, names: list[str], rounds: int) -> Side:
    """A step of all rows, behind their prompts."""
    step, packed, base = resident.carried.step, resident.model.packed, resident.base
    assert step is not None
    count, native = len(names), step.native
    cache = row_cache(base, rows=count, length=64 + rounds)
    prompts = prompts_of(count)
    by_model(resident, names, cache.whole_prompts(0, prompts, base.device))
    route = Route.of_rows(names, (count, 1))

    def run(turn: int, side: str) -> float:
        lengths = [len(prompt) + turn for prompt in prompts]
        given = cache.newest_tokens([11] * count, lengths, base.device)
        assert step.serves(route, packed)
        step.native = native if side == "C++" else None
        spent = milliseconds(lambda: step(cache, given, route, packed))
        step.native = native
        return spent

    return run


def reading(resident: ResidentModel, names: list[str], rounds: int) -> Side:
    """The prompts of all rows."""
    step, packed, base = resident.carried.step, resident.model.packed, resident.base
    assert step is not None
    prompts = prompts_of(len(names))
    cache = row_cache(base, rows=len(names), length=64)

    def run(turn: int, side: str) -> float:
        given = cache.whole_prompts(0, prompts, base.device)
        route = Route.of_rows(names, tuple(given["input_ids"].shape))
        assert step.serves(route, packed)
        if side == "C++":
            return milliseconds(lambda: step.of_prompts(cache, given, route, packed))
        return milliseconds(lambda: by_model(resident, names, given))

    return run


@torch.inference_mode()
def medians_and_least(
    sides: dict[str, Side], rounds: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """Milliseconds by the form of the weights, in C++ and by PyTorch, which all take turns."""
    found: dict[tuple[str, str], list[float]] = {
        (form, side): [] for form in sides for side in ("C++", "PyTorch")
    }
    for turn in range(rounds + 2):  # the first two warm up, and compare
        for (form, side), times in found.items():
            spent = sides[form](turn, side)
            if turn > 1:
                times.append(spent)
    return {key: (statistics.median(times), min(times)) for key, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--weights", nargs="+", choices=(PLAIN, *WEIGHTS), default=[PLAIN])
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if library().functions is None:
        parser.error(library().why_not)
    residents = {form: made(args.rank, form) for form in args.weights}
    for form, resident in residents.items():
        size = bytes_read(resident)
        lies = torch.ones(size // 4, dtype=torch.int32)
        read = statistics.median(milliseconds(lies.max) for _ in range(5))
        print(f"{form}: reading {size / 1e6:.0f} MB takes {read:.1f} ms")
    print(f"{torch.get_num_threads()} threads\n")
    first = next(iter(residents))
    print(
        f"| rows | weights | PyTorch, ms | C++, ms (least) | ratio of medians | {first} by this |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    ratios = {}
    for rows in args.rows:
        for title, names in (
            ("the base", [BASE] * rows),
            ("one adapter", ["0"] * rows),
            (f"{ADAPTERS} adapters", [str(i % ADAPTERS) for i in range(rows)]),
        ):
            if rows == 1 and title.startswith(str(ADAPTERS)):
                continue
            for kind, made_side in ((title, stepping), (f"{title}, prompts", reading)):
                with torch.inference_mode():
                    sides = {
                        form: made_side(own, names, args.rounds) for form, own in residents.items()
                    }
                times = medians_and_least(sides, args.rounds)
                for form in residents:
                    (slow, _), (fast, least) = times[form, "PyTorch"], times[form, "C++"]
                    beside = times[first, "C++"][0] / fast
                    ratios[f"{rows}, {kind}, {form}"] = round(slow / fast, 2), round(beside, 2)
                    print(
                        f"| {rows}, {kind} | {form} | {slow:.1f} | {fast:.1f} ({least:.1f}) | "
                        f"{slow / fast:.2f} | {beside:.2f} |"
                    )
    print(json.dumps({"threads": torch.get_num_threads(), "ratios": ratios}))


if __name__ == "__main__":
    main()
