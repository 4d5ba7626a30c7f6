"""How many tokens go through the model at a time: measured, on batches of the run itself.

Larger passes are faster up to where the machine is busy, and take memory for all of their tokens,
of whichever configuration these are. So passes are made larger as long as that pays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorakit.engine.shared_pass import AdapterBatch
from lorakit.training.forecast import TIGHT
from lorakit.training.machine import memory_mb, peak_memory_mb

PAYS = 1.05  # so many times faster is worth the memory of twice as many

WORTH_A_TRIAL = 1.1
"""Twice as many are tried if they may be so many times faster: a trial takes their memory too."""

REPEATS = 2  # a machine is not the same from second to second: the faster one counts


@dataclass(frozen=True)
class PassSize:
    """The tokens of a pass (the batch of one configuration may have more), and why."""

    tokens: int
    line: str


def measure_pass_size(
    parts: Sequence[AdapterBatch], run: Callable[[Sequence[AdapterBatch]], None]
) -> PassSize:
    """Runs passes of one configuration, two, four, …, as long as that pays and fits.

    Args:
        parts: the largest batch of each configuration.
        run: a pass forwards and backwards, of which nothing is left; waits for its end.
    """
    ordered = sorted(parts, key=lambda part: part.tokens, reverse=True)
    rates: dict[int, float] = {}
    before, count = peak_memory_mb(), 1
    while True:
        tried, last = ordered[:count], max(rates, default=0)
        try:
            if count == 1:
                run(tried)  # takes what only the first pass takes
            rates[count] = _tokens(tried) / min(_seconds(run, tried) for _ in range(REPEATS))
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            why = f"{count} do not fit into memory"
            break
        if last and rates[count] < PAYS * rates[last]:
            why = f"{count} are hardly faster"
            break
        if count == len(ordered):
            why = "all of them fit"
            break
        following = min(2 * count, len(ordered))
        if _expected(rates, ordered, following) < WORTH_A_TRIAL * rates[count]:
            why = f"{following} would hardly be faster"
            break
        needs = before + (peak_memory_mb() - before) / count * following
        if needs > TIGHT * memory_mb():
            why = f"{following} would need {needs / 1e3:.1f} of {memory_mb() / 1e3:.0f} GB"
            break
        count = following
    measured = ", ".join(f"{n} at a time {rate:,.0f} tokens/s" for n, rate in rates.items())
    tokens = _tokens(ordered[: fewest_worth(rates)])
    line = f"up to {tokens:,} tokens go through the model at a time: {measured} ({why})"
    return PassSize(tokens, line)


def fewest_worth(rates: Mapping[int, float]) -> int:
    """The number at a time from which more do not pay, of tokens a second by number."""
    chosen, *others = sorted(rates)
    for number in others:
        if rates[number] < PAYS * rates[chosen]:
            break
        chosen = number
    return chosen


def _expected(rates: Mapping[int, float], ordered: Sequence[AdapterBatch], following: int) -> float:
    """The tokens a second of `following`, if a pass takes some time and each token its own.

    Trying it would take its memory. With one measurement there is nothing to go by: infinite.
    """
    if len(rates) < 2:
        return math.inf
    *_, one, two = sorted(rates)
    tokens = [_tokens(ordered[:number]) for number in (one, two, following)]
    seconds = [tokens[0] / rates[one], tokens[1] / rates[two]]
    each = (seconds[1] - seconds[0]) / (tokens[1] - tokens[0])
    return tokens[2] / (seconds[1] + max(each, 0.0) * (tokens[2] - tokens[1]))


def _tokens(parts: Sequence[AdapterBatch]) -> int:
    return sum(part.tokens for part in parts)


def _seconds(run: Callable[[Sequence[AdapterBatch]], None], parts: Sequence[AdapterBatch]) -> float:
    began = time.perf_counter()
    run(parts)
    return time.perf_counter() - began
