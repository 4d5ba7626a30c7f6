"""`lorakit serve --training` under load: many clients of the Tinker SDK that train and sample.

A real server in a process of its own, and clients with a key each: most wait for every step, and
one in eight keeps several batches of four times the size waiting. What is printed: how requests
ended, tokens a second, each client's share of what was trained, and the server's memory.

    python -m benchmarks.training_load [--minutes 10] [--clients 32]
"""

import argparse
import collections
import logging
import random
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tinker import types

from benchmarks.resident_memory import growth, resident_mb
from benchmarks.serve_common import MODEL
from benchmarks.training_service import connected, datums, in_threads, rows_of, serving

RANKS = (1, 8, 32)


@dataclass
class Seen:
    """What all clients met: ends of requests, and tokens of each client."""

    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    trained: collections.Counter[int] = field(default_factory=collections.Counter)
    sampled: collections.Counter[int] = field(default_factory=collections.Counter)
    memory: list[float] = field(default_factory=list)


def be_client(model: str, address: str, number: int, end: float, seen: Seen) -> None:
    """Trains steps of 4 rows of 64 tokens, and samples after the first and every fourth then."""
    chance = random.Random(number)
    greedy = number % 8 == 7
    with connected(address, f"tml-{number}") as service:
        run = service.create_lora_training_client(
            model, rank=chance.choice(RANKS), seed=number, train_unembed=chance.random() < 0.5
        ).result()
        turn = 0
        while time.monotonic() < end:
            turn += 1
            size, count = (16, 4) if greedy else (4, 1)
            batches = [datums(rows_of(size, 64, chance.randrange(2**32))) for _ in range(count)]
            losses = [run.forward_backward(batch, "cross_entropy") for batch in batches]
            step = run.optim_step(types.AdamParams(learning_rate=1e-4))
            for batch, loss in zip(batches, losses, strict=True):
                note(seen, "trained", loss)
                seen.trained[number] += 64 * len(batch) * (time.monotonic() < end)
            note(seen, "step", step)
            if turn % 4 == 1 and time.monotonic() < end:
                sample(run, chance, number, seen)


def sample(run: Any, chance: random.Random, number: int, seen: Seen) -> None:
    prompt = types.ModelInput.from_ints([chance.randrange(1000, 40000) for _ in range(32)])
    wanted = types.SamplingParams(max_tokens=16, temperature=1.0, stop=[])
    answers = run.save_weights_and_get_sampling_client().result()
    found = note(seen, "sampled", answers.sample(prompt, 2, wanted))
    seen.sampled[number] += sum(len(one.tokens) for one in found.sequences) if found else 0


def note(seen: Seen, kind: str, future: Any) -> Any:
    """The result of a request, whose end is counted."""
    try:
        result = future.result(timeout=600)
    except Exception as error:
        seen.ends[f"{kind}: {type(error).__name__}: {str(error)[:80]}"] += 1
        return None
    seen.ends[kind] += 1
    return result


def watch(process: int, end: float, seen: Seen) -> None:
    while time.monotonic() < end:
        time.sleep(5)
        seen.memory.append(resident_mb(process))


def load(address: str, process: int, args: argparse.Namespace) -> Seen:
    seen, end = Seen(), time.monotonic() + 60 * args.minutes
    clients = [
        partial(be_client, args.model, address, number, end, seen) for number in range(args.clients)
    ]
    in_threads([*clients, partial(watch, process, end, seen)])
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    logging.getLogger("tinker").setLevel(logging.ERROR)  # it logs each answer that is not there yet
    with serving(args) as (address, process):
        seen = load(address, process, args)
    print(f"ends: {dict(sorted(seen.ends.items()))}")
    seconds = 60 * args.minutes
    print(f"trained {seen.trained.total() / seconds:.0f} tokens a second")
    print(f"sampled {seen.sampled.total() / seconds:.1f} tokens a second")
    equal = seen.trained.total() / args.clients
    shares = sorted(seen.trained[number] / equal for number in range(args.clients))
    print(
        f"share of an equal one: slowest {shares[0]:.2f}, median {statistics.median(shares):.2f}, "
        f"fastest {shares[-1]:.2f}"
    )
    print(growth(seen.memory))


if __name__ == "__main__":
    main()
