"""The time to the first token of many requests whose system prompt is the same.

`python -m benchmarks.serve --parts prefix`: without a cache of prefixes, with it, and once more
when the prompt is known from before.
"""

import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from benchmarks.serve_common import MODEL, QUESTIONS, endless
from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.engine.prefix_cache import PREFIX_BYTES
from lorakit.engine.requests import Ticket
from lorakit.engine.sampling import Sampling


def to_first_token(
    engine: Engine, prompts: Sequence[Sequence[int]], name: str, tokens: int
) -> list[float]:
    """Seconds from handing in all prompts at once to the first token of each."""
    sampling = Sampling(max_new_tokens=tokens)
    began = time.perf_counter()
    tickets = [engine.submit(prompt, name, sampling) for prompt in prompts]

    def first(ticket: Ticket) -> float:
        pieces = iter(ticket)
        next(pieces)
        seconds = time.perf_counter() - began
        for _ in pieces:
            pass
        return seconds

    with ThreadPoolExecutor(len(tickets)) as threads:
        return list(threads.map(first, tickets))


def prefix(folders: Sequence[Path], tokens: int, requests: int = 32, length: int = 1500) -> None:
    """One system prompt for all requests, without a cache of prefixes, with it, and once more."""
    found: dict[str, list[float]] = {}
    computed: dict[str, float] = {}
    few = min(16, requests)
    for rows, most in ((few, 0), (few, PREFIX_BYTES), (requests, PREFIX_BYTES)):
        with endless():
            engine = open_engine(
                MODEL,
                {"one": folders[0]},
                dtype="bfloat16",
                max_rows=rows,
                context_length=2048,
                prefix_bytes=most,
            )
        with closing(engine):
            words = engine.tokenizer(" ".join(QUESTIONS)).input_ids * 50
            told = engine.tokenizer([f" {i}: {q}" for i, q in enumerate(QUESTIONS * 8)])
            to_first_token(engine, [told.input_ids[-1]], "one", 4)  # warms up
            # In the end the memory of rows has been used before, as it has in a running server.
            turns = {"": (0, 0), ", known before": (0, 1), ", another prompt": (1, 0)}
            for title, (system, half) in turns.items() if most else [("", (0, 0))]:
                name = f"{rows} rows, {'on' if most else 'off'}{title}"
                own = told.input_ids[half * requests : (half + 1) * requests]
                asked = [[*words[system : system + length], *one] for one in own]
                began = time.perf_counter()
                found[name] = to_first_token(engine, asked, "one", tokens)
                computed[name] = time.perf_counter() - began
    print(f"\n| {requests} requests | first token, mean s | last | all done, s | ratio of means |")
    print("| --- | --- | --- | --- | --- |")
    means = {name: statistics.mean(seconds) for name, seconds in found.items()}
    first = next(iter(means.values()))
    for name, mean in means.items():
        last, whole = max(found[name]), computed[name]
        print(f"| {name} | {mean:.2f} | {last:.2f} | {whole:.2f} | {mean / first:.3f} |")
    print(json.dumps({"title": "prefix", "first_token_seconds": means}), flush=True)
