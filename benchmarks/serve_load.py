"""`lorakit serve` under load: many clients that mix adapters, lengths and cancellations.

A real server in a process of its own; meanwhile adapters are loaded, replaced and unloaded. What
is printed: statuses, time to the first token and between tokens, and the server's memory.

    python -m benchmarks.serve_load [--minutes 5] [--clients 64] [--adapters DIR]
"""

import argparse
import asyncio
import collections
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.resident_memory import growth, resident_mb
from benchmarks.serve import MODEL, QUESTIONS, save_adapters

KEYS = {"Authorization": "Bearer load"}
ADMIN = {"Authorization": "Bearer admin"}


@dataclass
class Seen:
    """What all clients met."""

    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    tokens: int = 0


async def be_client(client: httpx.AsyncClient, seed: int, end: float, seen: Seen) -> None:
    chance = random.Random(seed)
    while time.monotonic() < end:
        words = " ".join(chance.choices(" ".join(QUESTIONS).split(), k=chance.choice([5, 40, 200])))
        body = {
            "model": chance.choice([*(f"a{i}" for i in range(8)), "guest", MODEL]),
            "messages": [{"role": "user", "content": words}],
            "max_tokens": chance.choice([4, 16, 48]),
            "temperature": chance.choice([0, 1]),
            "stream": True,
        }
        leaves_after = chance.randrange(10) if chance.random() < 0.2 else None
        try:
            status = await stream(client, body, leaves_after, seen)
        except (httpx.HTTPError, OSError) as error:
            status = type(error).__name__
        seen.ends[status] += 1
        if status == "429":
            await asyncio.sleep(1)


async def stream(
    client: httpx.AsyncClient, body: dict, leaves_after: int | None, seen: Seen
) -> str:
    """How one request ended: its status, `left`, or `error event`."""
    before, events = time.monotonic(), 0
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=KEYS) as reply:
        if reply.status_code != 200:
            await reply.aread()
            # The guest comes and goes, so that it is not there is no error.
            known = reply.status_code == 404 and body["model"] == "guest"
            return "404 (guest)" if known else str(reply.status_code)
        async for line in reply.aiter_lines():
            if line.startswith('data: {"error"'):
                return "error event"
            if '"content":"' not in line or '"content":""' in line:
                continue
            now = time.monotonic()
            (seen.between if events else seen.first).append(now - before)
            before, events = now, events + 1
            seen.tokens += 1
            if leaves_after is not None and events > leaves_after:
                return "left"
    return "200"


async def load_and_unload(
    client: httpx.AsyncClient, folders: list[Path], end: float, seen: Seen
) -> None:
    turn = 0
    while time.monotonic() < end:
        await asyncio.sleep(2)
        turn += 1
        if turn % 5 == 0:
            path, body = "unload", {"lora_name": "guest"}
        else:
            folder = folders[turn % len(folders)]
            path, body = (
                "load",
                {
                    "lora_name": "guest",
                    "lora_path": str(folder),
                    "load_inplace": True,
                },
            )
        reply = await client.post(f"/v1/{path}_lora_adapter", json=body, headers=ADMIN)
        seen.ends[f"{path} {reply.status_code}"] += 1


async def watch(process: int, end: float, seen: Seen) -> None:
    while time.monotonic() < end:
        await asyncio.sleep(5)
        seen.memory.append(resident_mb(process))


async def load(address: str, process: int, folders: list[Path], args: argparse.Namespace) -> Seen:
    seen, end = Seen(), time.monotonic() + 60 * args.minutes
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        await asyncio.gather(
            *(be_client(client, seed, end, seen) for seed in range(args.clients)),
            load_and_unload(client, folders, end, seen),
            watch(process, end, seen),
        )
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=Path, help="where the adapters lie, or are made")
    parser.add_argument("--max-waiting", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = (args.adapters or Path(temporary)).resolve()
        folders = save_adapters(root)
        command = [sys.executable, "-m", "lorakit", "serve", *map(str, folders)]
        options = ["--port", "0", "--adapter-root", str(root), "--dtype", "bfloat16"]
        options += ["--max-waiting", str(args.max_waiting)]
        keys = {"LORAKIT_API_KEY": "load", "LORAKIT_ADMIN_KEY": "admin"}
        with subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, text=True, env={**os.environ, **keys}
        ) as server:
            assert server.stdout
            address = re.search(r"at (http\S+)", server.stdout.readline())
            assert address
            seen = asyncio.run(load(address[1], server.pid, folders, args))
            server.send_signal(signal.SIGTERM)
            code = server.wait()
    print(f"ends: {dict(sorted(seen.ends.items()))}; the server's exit code: {code}")
    print(f"{seen.tokens} pieces, {seen.tokens / args.minutes / 60:.0f} a second")
    for name, times in (("first token", seen.first), ("between tokens", seen.between)):
        cuts = statistics.quantiles(times, n=100)
        print(f"{name}: p50 {cuts[49] * 1000:.0f} ms, p99 {cuts[98] * 1000:.0f} ms")
    print(growth(seen.memory))


if __name__ == "__main__":
    main()
