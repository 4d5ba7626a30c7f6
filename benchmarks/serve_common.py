"""What the benchmarks of serving share: questions, adapters, and sides that take turns."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from benchmarks.combine import make
from lorakit.engine.engine import Engine
from lorakit.engine.sampling import Ending, Sampling
from lorakit.models.bundled import ALIAS as MODEL

QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain photosynthesis to a child in a few sentences.",
    "List three uses of a paperclip.",
    "Who wrote Hamlet, and when?",
    "Give me a recipe for pancakes with blueberries.",
    "Translate 'good morning' into Spanish, German and Italian, please.",
    "What is 17 times 23? Show your work.",
]


def save_adapters(folder: Path, base: str = MODEL) -> list[Path]:
    """Eight random adapters of rank 16 on all linear layers, made once."""
    return make(folder, 8, 16, base)


@contextmanager
def endless() -> Iterator[None]:
    """No token ends an answer meanwhile, so that all have one length."""
    without = Ending(frozenset())
    with (
        patch("lorakit.engine.engine.ending", return_value=without),
        patch("lorakit.engine.pool.ending", return_value=without),
    ):
        yield


def answered(
    engine: Engine, prompts: Sequence[Sequence[int]], names: Sequence[str | None], tokens: int
) -> int:
    sampling = Sampling(max_new_tokens=tokens)
    tickets = [engine.submit(*asked, sampling) for asked in zip(prompts, names, strict=True)]
    return sum(list(ticket)[-1].new_tokens for ticket in tickets)


def take_turns(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Median tokens a second of each; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            rate = side() / (time.perf_counter() - began)
            if turn:
                found[name].append(rate)
                print(f"{name}: {rate:.1f} tokens/s", file=sys.stderr)
    return {name: statistics.median(rates) for name, rates in found.items()}


def show(title: str, rates: dict[str, float]) -> None:
    """Prints a table, with ratios to the first side, and a line of JSON."""
    print(f"\n| {title} | tokens/s | ratio |\n| --- | --- | --- |")
    first = next(iter(rates.values()))
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} | {rate / first:.2f} |", flush=True)
    print(json.dumps({"title": title, "tokens_per_second": rates}), flush=True)
