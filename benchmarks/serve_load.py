"""`lorakit serve` under load: many clients that mix adapters, lengths, forms and cancellations.

A real server in a process of its own; meanwhile adapters are loaded, replaced and unloaded. What
is printed: statuses, time to the first token and between tokens, and the server's memory. A client
that is told to come back (429) waits as its next try does, so that its time counts from the first.

    python -m benchmarks.serve_load [--minutes 5] [--clients 64] [--mix plain,schema,tools]
    python -m benchmarks.serve_load --before CHECKOUT --minutes 2

With `--before` the server of another checkout has the same load in turn with this one's: plain
requests, which both know, and last the mix on this one alone. Equal load is the same clients, each
with one request at a time, and the same requests in the same order. They begin one after the other
within the first tenth of the time.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.resident_memory import growth, resident_mb
from benchmarks.serve_common import MODEL, QUESTIONS, save_adapters
from benchmarks.serve_forms import schemas

KEYS = {"Authorization": "Bearer load"}
ADMIN = {"Authorization": "Bearer admin"}


@dataclass
class Seen:
    """What all clients met."""

    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    tokens: int = 0


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"The {name} of an item.",
            "parameters": {
                "type": "object",
                "properties": {"item": {"type": "string", "maxLength": 20}},
                "required": ["item"],
            },
        },
    }
    for name in ("stock", "price")
]
KINDS = ("plain", "schema", "tools")
TOOL_MODEL = "tools"
"""An adapter whose template shows tools."""


def request(chance: random.Random, mix: Sequence[str]) -> dict[str, Any]:
    """The body of one request."""
    words = " ".join(chance.choices(" ".join(QUESTIONS).split(), k=chance.choice([5, 40, 200])))
    body: dict[str, Any] = {
        "model": chance.choice([*(f"a{i}" for i in range(8)), "guest", MODEL]),
        "messages": [{"role": "user", "content": words}],
        "max_tokens": chance.choice([4, 16, 48]),
        "temperature": chance.choice([0, 1]),
        "stream": True,
    }
    kind = mix[chance.randrange(len(mix))] if len(mix) > 1 else mix[0]
    if kind == "schema":
        # Some of them are new, so that grammars are compiled all the time.
        schema = {**chance.choice(schemas()), "minItems": 400 + chance.randrange(40)}
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "records", "schema": schema},
        }
    elif kind == "tools":
        choice = chance.choice(["auto", "required"])
        body |= {"model": TOOL_MODEL, "tools": TOOLS, "tool_choice": choice}
    return body


async def be_client(
    client: httpx.AsyncClient, seed: int, mix: Sequence[str], begin: float, end: float, seen: Seen
) -> None:
    """Asks until the end, one request after the other."""
    chance = random.Random(seed)
    await asyncio.sleep(begin - time.monotonic())
    while time.monotonic() < end:
        body, asked = request(chance, mix), time.monotonic()
        leaves_after = chance.randrange(10) if chance.random() < 0.2 else None
        status = "429"
        while status == "429" and time.monotonic() < end:
            try:
                status = await stream(client, body, asked, leaves_after, seen)
            except (httpx.HTTPError, OSError) as error:
                status = type(error).__name__
            seen.ends[status] += 1
            if status == "429":
                await asyncio.sleep(1)


async def stream(
    client: httpx.AsyncClient,
    body: dict[str, Any],
    asked: float,
    leaves_after: int | None,
    seen: Seen,
) -> str:
    """How one request ended: its status, `left`, or `error event`."""
    before, events = asked, 0
    async with client.stream("POST", "/v1/chat/completions", json=body, headers=KEYS) as reply:
        if reply.status_code != 200:
            told = await reply.aread()
            # The guest comes and goes, so that it is not there is no error.
            known = reply.status_code == 404 and body["model"] == "guest"
            if not known and reply.status_code != 429 and len(seen.errors) < 5:
                seen.errors.append(told.decode(errors="replace")[:300])
            return "404 (guest)" if known else str(reply.status_code)
        async for line in reply.aiter_lines():
            if line.startswith('data: {"error"'):
                seen.errors.append(line[:300])
                return "error event"
            written = '"content":"' in line and '"content":""' not in line
            if not written and '"tool_calls":[' not in line:
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


async def load(
    address: str, process: int, folders: list[Path], mix: Sequence[str], args: argparse.Namespace
) -> Seen:
    seen, began, seconds = Seen(), time.monotonic(), 60 * args.minutes
    begins = [began + seconds / 10 * number / args.clients for number in range(args.clients)]
    end = began + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        await asyncio.gather(
            *(be_client(client, seed, mix, at, end, seen) for seed, at in enumerate(begins)),
            load_and_unload(client, folders, end, seen),
            watch(process, end, seen),
        )
    return seen


def under_load(
    title: str, root: Path, mix: Sequence[str], args: argparse.Namespace, source: Path | None = None
) -> dict[str, float]:
    """A server's figures under the load; they are printed too.

    Args:
        source: the checkout whose server it is; None for this one.
    """
    folders = save_adapters(root)
    served = [*map(str, folders)]
    if "tools" in mix:
        served.append(f"{TOOL_MODEL}={with_tools(folders[0])}")
    command = [sys.executable, "-m", "lorakit", "serve", *served, *args.serve.split()]
    options = ["--port", "0", "--adapter-root", str(root), "--dtype", "bfloat16"]
    options += ["--max-waiting", str(args.max_waiting)]
    environment = {**os.environ, "LORAKIT_API_KEY": "load", "LORAKIT_ADMIN_KEY": "admin"}
    if source is not None:
        environment["PYTHONPATH"] = str((source / "src").resolve())
        command[4:] = [*map(str, folders)]  # options of today may be unknown there
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout
        address = re.search(r"at (http\S+)", server.stdout.readline())
        assert address
        process = psutil.Process(server.pid)
        before = sum(process.cpu_times()[:2])
        seen = asyncio.run(load(address[1], server.pid, folders, mix, args))
        used = sum(process.cpu_times()[:2]) - before
        server.send_signal(signal.SIGTERM)
        code = server.wait()
    failed = sum(count for end, count in seen.ends.items() if end.startswith("5") or "err" in end)
    print(f"\n{title}: {dict(sorted(seen.ends.items()))}; the server's exit code: {code}")
    for error in seen.errors:
        print(f"  {error}")
    print(f"{seen.tokens} pieces, {seen.tokens / args.minutes / 60:.0f} a second")
    answers = max(1, len(seen.first))
    print(f"{answers} answers, {used / answers:.2f} s of CPU time each")
    figures = {
        "failed": float(failed),
        "pieces_per_second": seen.tokens / args.minutes / 60,
        "cpu_seconds_an_answer": used / answers,
    }
    for name, times in (("first token", seen.first), ("between tokens", seen.between)):
        cuts = statistics.quantiles(times, n=100)
        mean = statistics.mean(times)
        print(
            f"{name}: mean {mean * 1000:.0f} ms, p50 {cuts[49] * 1000:.0f} ms, "
            f"p99 {cuts[98] * 1000:.0f} ms, most {max(times) * 1000:.0f} ms"
        )
        key = name.replace(" ", "_")
        figures |= {f"{key}_mean": mean, f"{key}_p50": cuts[49], f"{key}_p99": cuts[98]}
    print(growth(seen.memory), flush=True)
    return figures


def with_tools(folder: Path) -> Path:
    """A copy of an adapter with a chat template that shows tools."""
    copied = folder.with_name(TOOL_MODEL)
    if not copied.is_dir():
        shutil.copytree(folder, copied)
        template = Path(__file__).parents[1] / "examples" / "tool_calls.jinja"
        shutil.copy(template, copied / "chat_template.jinja")
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=5, help="of each load")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--adapters", type=Path, help="where the adapters lie, or are made")
    parser.add_argument("--max-waiting", type=int, default=256)
    parser.add_argument("--mix", default=",".join(KINDS), help="of requests, one as often as each")
    parser.add_argument("--serve", default="", help="more options of this checkout's server")
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=1, help="with --before")
    args = parser.parse_args()
    mix = args.mix.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        root = (args.adapters or Path(temporary)).resolve()
        if args.before is None:
            print(json.dumps(under_load(args.mix, root, mix, args)))
            return
        found: dict[str, list[dict[str, float]]] = {"before": [], "now": [], "now, mixed": []}
        for _ in range(args.rounds):
            found["before"].append(under_load("before", root, ["plain"], args, args.before))
            found["now"].append(under_load("now", root, ["plain"], args))
            if mix != ["plain"]:
                found["now, mixed"].append(under_load("now, mixed", root, mix, args))
    middle = {
        side: {name: statistics.median(one[name] for one in runs) for name in runs[0]}
        for side, runs in found.items()
        if runs
    }
    columns = "first token, p50 s | p99 s | ratio of p99 | pieces/s | CPU s an answer"
    print(f"\n| {args.clients} clients | {columns} |")
    print("| --- | --- | --- | --- | --- | --- |")
    first = middle["before"]["first_token_p99"]
    for side, figures in middle.items():
        p50, p99 = figures["first_token_p50"], figures["first_token_p99"]
        rate, each = figures["pieces_per_second"], figures["cpu_seconds_an_answer"]
        print(f"| {side} | {p50:.2f} | {p99:.2f} | {p99 / first:.2f} | {rate:.0f} | {each:.2f} |")
    print(json.dumps(middle))


if __name__ == "__main__":
    main()
