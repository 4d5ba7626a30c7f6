"""How much goes through the model at a time: measured, on batches of the run itself.

More positions in a pass are faster up to where the machine is busy, and take memory for all of
them; a token is what counts, of whichever configuration it is. So passes are made larger as long
as that pays.
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

PAYS = 1.05
"""So many times faster is worth the memory of twice as many."""

WORTH_A_TRIAL = 1.1
"""Twice as many are tried if they may be so many times faster: a trial takes their memory too."""

REPEATS = 2  # a machine is not the same from second to second: the faster one counts


@dataclass(frozen=True)
class Room:
    """What a pass may hold, and what was measured to say so.

    Attributes:
        tokens: of all configurations in a pass; one configuration's batch may have more.
        line: what was decided and why.
    """

    tokens: int
    line: str


def measure_room(
    parts: Sequence[AdapterBatch], run: Callable[[Sequence[AdapterBatch]], None]
) -> Room:
    """Runs passes of one configuration, two, four, …, as long as that pays and fits.

    Args:
        parts: the largest batch of each configuration.
        run: a pass forwards and backwards, of which nothing is left; waits for its end.
    """
    ordered = sorted(parts, key=lambda part: part.tokens, reverse=True)
    rates: dict[int, float] = {}
    peaks: dict[int, float] = {0: peak_memory_mb()}
    why = "all of them fit"
    count = 1
    while True:
        tried = ordered[:count]
        try:
            if count == 1:
                run(tried)  # takes what only the first pass takes
            rates[count] = _tokens(tried) / min(_seconds(run, tried) for _ in range(REPEATS))
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            why = f"{count} do not fit into memory"
            break
        peaks[count] = peak_memory_mb()
        if count > 1 and rates[count] < PAYS * rates[_before(count, rates)]:
            why = f"{count} are hardly faster"
            break
        if count == len(ordered):
            break
        following = min(2 * count, len(ordered))
        if _expected(rates, ordered, following) < WORTH_A_TRIAL * rates[count]:
            why = f"{following} would hardly be faster"
            break
        if needs := _too_much(peaks, count, following):
            why = f"{following} would need {needs / 1e3:.1f} of {memory_mb() / 1e3:.0f} GB"
            break
        count = following
    chosen = fewest_worth(rates)
    measured = ", ".join(f"{n} at a time {rate:,.0f} tokens/s" for n, rate in rates.items())
    tokens = _tokens(ordered[:chosen])
    line = f"up to {tokens:,} tokens go through the model at a time: {measured} ({why})"
    return Room(tokens, line)


def fewest_worth(rates: Mapping[int, float]) -> int:
    """The number at a time behind which more do not pay, of tokens a second by number."""
    numbers = sorted(rates)
    chosen = numbers[0]
    for number in numbers[1:]:
        if rates[number] < PAYS * rates[chosen]:
            break
        chosen = number
    return chosen


def _too_much(peaks: Mapping[int, float], count: int, following: int) -> float | None:
    """The memory in MB that `following` would take, where the machine has not got it."""
    each = (peaks[count] - peaks[0]) / count
    needs = peaks[0] + each * following
    return needs if needs > TIGHT * memory_mb() else None


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
    more = seconds[1] + max(each, 0.0) * (tokens[2] - tokens[1])
    return tokens[2] / more


def _before(count: int, rates: Mapping[int, float]) -> int:
    return max(number for number in rates if number < count)


def _tokens(parts: Sequence[AdapterBatch]) -> int:
    return sum(part.tokens for part in parts)


def _seconds(run: Callable[[Sequence[AdapterBatch]], None], parts: Sequence[AdapterBatch]) -> float:
    began = time.perf_counter()
    run(parts)
    return time.perf_counter() - began
