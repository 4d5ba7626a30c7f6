"""Eight prompts, each by another adapter: lorakit's engine beside PEFT, the bare base, and HTTP.

All sides have the same base in bfloat16 and take turns; answers are greedy and of one length, and
no side keeps prompts between rounds. `switching` is what serving many adapters is without any of
this: PEFT with one request after the other, the adapter switched before each.

    python -m benchmarks.serve [--tokens 64] [--rounds 5] [--adapters DIR]
    python -m benchmarks.serve --parts peers --vllm PYTHON --llama-cpp PYTHON

The latter compares with vLLM and llama.cpp too, each in an environment of its own
(`serve_peers.py`). With `--family` the base is a small random one, most of whose layers have a
window or a state; its prompts are longer than the window.

    python -m benchmarks.serve --parts peers --family gemma3_text

`one` is one prompt and one adapter, in bfloat16 and 8 bits; `prefix` the time to the first token of
32 requests whose system prompt of 1,500 tokens is the same; `forms` answers of JSON schemas beside
answers of any text; `rows` what a model in training samples, four prompts, with more and more
answers at once.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import lorakit
from benchmarks.serve_common import (
    MODEL,
    QUESTIONS,
    answered,
    endless,
    save_adapters,
    show,
    take_turns,
)
from benchmarks.serve_forms import forms
from benchmarks.serve_peers import (
    OtherEngine,
    llama_cpp_engines,
    lorakit_engine,
    vllm_engines,
)
from benchmarks.serve_prefix import prefix
from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampler import Sampler
from lorakit.engine.sampling import Ending, Sampling, pad_left, prompt_tokens
from lorakit.lora.model import LoraModel
from lorakit.lora.routing import Route
from lorakit.models.names import resolve
from lorakit.server.options import Limits, ServerOptions
from lorakit.server.run import listen, make_server

PARTS = {"peers", "http", "registered", "one", "forms", "prefix", "rows"}

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
WINDOW = {"sliding_window": 16}
DELTA = {
    "head_dim": 64,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": WINDOW,
    "gemma3_text": {**WINDOW, "head_dim": 64, "query_pre_attn_scalar": 64},
    "qwen3_5_text": DELTA,
    "falcon_h1": {
        "head_dim": 64,
        "mamba_d_ssm": 512,
        "mamba_n_heads": 16,
        "mamba_d_head": 32,
        "mamba_d_state": 32,
        "mamba_n_groups": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 4},
}


def save_random(family: str, folder: Path) -> str:
    """Writes a random model of a family with the bundled model's tokenizer; returns its path."""
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL).path)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        **SIZES,
        **FAMILIES[family],
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    return dict(zip(("input_ids", "attention_mask"), pad_left(rows, 0), strict=True))


class Sides:
    """What takes turns; each returns how many tokens it wrote."""

    def __init__(self, folders: Sequence[Path], tokens: int, model: str = MODEL) -> None:
        import peft

        self.tokens, self.model, self.folders = tokens, model, folders
        self.names = [path.name for path in folders]
        with endless():
            self.engine = open_engine(
                model,
                dict(zip(self.names, folders, strict=True)),
                dtype="bfloat16",
                max_rows=8,
                context_length=2048,
                prefix_bytes=0,
            )
        turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
        self.prompts = [prompt_tokens(turn, self.engine.tokenizer) for turn in turns]
        self.settings = GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
        )
        self.base, _ = lorakit.load_model(model, "bfloat16")
        other, _ = lorakit.load_model(model, "bfloat16")
        self.peft: Any = peft.PeftModel.from_pretrained(other, folders[0], self.names[0])
        for name, path in zip(self.names[1:], folders[1:], strict=True):
            self.peft.load_adapter(path, name)
        for plain in (self.base.eval(), self.peft.eval().get_base_model()):
            plain.generation_config = self.settings

    def peers(
        self, own: OtherEngine, vllm: Mapping[str, OtherEngine]
    ) -> dict[str, Callable[[], int]]:
        one = [self.names[0]] * 8

        def asked(engine: OtherEngine, names: Sequence[str | None]) -> Callable[[], int]:
            return partial(engine.answered, self.prompts, names, self.tokens)

        sides: dict[str, Callable[[], int]] = {
            "the bare base's generate": self.the_bare_base,
            "PEFT, adapter_names": self.peft_adapter_names,
            "PEFT, switching": self.peft_switching,
            "engine, the base": asked(own, [None] * 8),
            "engine, one adapter": asked(own, one),
            "engine, eight adapters": asked(own, self.names),
        }
        if vllm:
            sides |= {
                "vLLM, the base": asked(vllm["base"], [None] * 8),
                "vLLM, one adapter": asked(vllm["adapters"], one),
                "vLLM, eight adapters": asked(vllm["adapters"], self.names),
            }
        return sides

    def the_bare_base(self) -> int:
        return self.base.generate(**padded(self.prompts))[:, -self.tokens :].numel()

    def peft_adapter_names(self) -> int:
        options = {"adapter_names": self.names, **padded(self.prompts)}
        return self.peft.generate(**options)[:, -self.tokens :].numel()

    def peft_switching(self) -> int:
        written = 0
        for name, prompt in zip(self.names, self.prompts, strict=True):
            self.peft.set_adapter(name)
            written += self.peft.generate(**padded([prompt]))[:, -self.tokens :].numel()
        return written

    def engine_eight_adapters(self) -> int:
        return answered(self.engine, self.prompts, self.names, self.tokens)


def registered(
    folders: Sequence[Path], prompts: Sequence[Sequence[int]], tokens: int
) -> dict[str, float]:
    """Eight running rows of 2, 16 and 64 adapters, all read before; which ones goes round."""
    sides: dict[str, Callable[[], int]] = {}
    engines = []
    for count in (2, 16, 64):
        named = {f"n{i}": folders[i % len(folders)] for i in range(count)}
        with endless():
            engine = open_engine(MODEL, named, dtype="bfloat16", max_rows=8, context_length=2048)
        engines.append(engine)
        began = time.perf_counter()
        for name in named:
            answered(engine, prompts[:1], [name], 1)
        seconds = (time.perf_counter() - began) / count
        print(f"{count} registered: {seconds:.2f} s for the first token of each", file=sys.stderr)
        turn = iter(range(1 << 30))

        def run(engine: Engine = engine, count: int = count, turn: Iterator[int] = turn) -> int:
            first = 8 * next(turn)
            names = [f"n{(first + i) % count}" for i in range(8)]
            return answered(engine, prompts, names, tokens)

        sides[f"{count} registered"] = run
    try:
        return take_turns(sides, 8)  # so that 64 come round once more
    finally:
        for engine in engines:
            engine.close()


def rows(folder: Path, tokens: int, rounds: int) -> None:
    """What `Sampler` writes at the temperature 1, as reinforcement learning asks for it."""
    model, tokenizer = lorakit.load_model(MODEL, "bfloat16")
    adapted = LoraModel.from_pretrained(model, folder, "one", is_trainable=True).eval()
    with patch("lorakit.engine.sampler.ending", return_value=Ending(frozenset())):
        sampler = Sampler(adapted, tokenizer)
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS[:4]]
    prompts = [prompt_tokens(turn, tokenizer) for turn in turns]

    def write(answers: int) -> int:
        asked = [prompt for prompt in prompts for _ in range(answers // 4)]
        each = [
            Sampling(1.0, max_new_tokens=tokens, seed=seed, logprobs=0, scaled_logprobs=True)
            for seed in range(answers)
        ]
        written = sampler.write(asked, each, Route(shared=("one",)))
        return sum(row.new_tokens for row in written)

    sides: dict[str, Callable[[], int]] = {
        f"{n} answers": partial(write, n) for n in (8, 16, 32, 64)
    }
    show("4 prompts, one adapter", take_turns(sides, rounds))


@contextmanager
def served(engine: Engine) -> Iterator[str]:
    """The engine behind HTTP, in a thread of this process."""
    with listen("127.0.0.1", 0) as sock:
        address: list[str] = []
        came = threading.Event()
        server = make_server(
            engine,
            ServerOptions(limits=Limits()),
            lambda found: (address.append(found), came.set()),  # type: ignore[func-returns-value]
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        came.wait()
        try:
            yield address[0]
        finally:
            server.should_exit = True
            thread.join()


class Client:
    """Asks over HTTP from a process of its own, as clients do."""

    def __init__(self, address: str, tokens: int, names: Sequence[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.serve", "--client", address]
        self._process = subprocess.Popen(
            [*command, "--tokens", str(tokens), "--names", ",".join(names)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, streamed: bool) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{int(streamed)}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


async def be_client(address: str, tokens: int, names: Sequence[str]) -> None:
    """Reads 0 (whole) or 1 (streamed) a line, and asks all questions at once."""

    async def ask(client: httpx.AsyncClient, name: str, question: str, stream: bool) -> int:
        body = {
            "model": name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": stream,
        }
        if not stream:
            reply = await client.post("/v1/chat/completions", json=body)
            return int(reply.raise_for_status().json()["usage"]["completion_tokens"])
        body["stream_options"] = {"include_usage": True}
        usage = 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if line.startswith("data: {") and (found := json.loads(line[6:]).get("usage")):
                    usage = int(found["completion_tokens"])
        return usage

    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = zip(names, QUESTIONS, strict=True)
            counts = await asyncio.gather(*(ask(client, *one, line == "1\n") for one in asked))
            print(sum(counts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--adapters", type=Path, help="where the adapters lie, or are made")
    parser.add_argument("--family", choices=FAMILIES, help="a random base of this family")
    parser.add_argument(
        "--parts", default="peers,http,registered", help=f"some of {', '.join(sorted(PARTS))}"
    )
    parser.add_argument("--requests", type=int, default=32, help="of prefix")
    parser.add_argument("--vllm", type=Path, help="the interpreter of an environment with vLLM")
    parser.add_argument("--llama-cpp", type=Path, help="of one with llama-cpp-python")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--names", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        asyncio.run(be_client(args.client, args.tokens, args.names.split(",")))
        return
    parts = args.parts.split(",")
    if unknown := set(parts) - PARTS:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(sorted(PARTS))}")
    if args.family and (other := set(parts) - {"peers", "http"}):
        parser.error(f"{', '.join(other)}: not with --family")
    with tempfile.TemporaryDirectory() as temporary:
        base = save_random(args.family, Path(temporary) / "base") if args.family else MODEL
        folders = save_adapters(args.adapters or Path(temporary), base)
        if not {"peers", "http", "registered"}.isdisjoint(parts):
            sides = Sides(folders, args.tokens, base)
            side_by_side(sides, args.vllm, parts, args.rounds)
            sides.engine.close()
        if "one" in parts:
            one_row(folders[0], args.llama_cpp, args.tokens, args.rounds)
        if "forms" in parts:
            forms(folders, args.tokens, args.rounds)
        if "prefix" in parts:
            prefix(folders, args.tokens, args.requests)
        if "rows" in parts:
            rows(folders[0], args.tokens, args.rounds)
        if "registered" in parts:
            show("8 rows, of", registered(folders, sides.prompts, args.tokens))


def side_by_side(sides: Sides, vllm: Path | None, parts: Sequence[str], rounds: int) -> None:
    """The engine beside its peers, and behind HTTP."""
    for notice in sides.engine.notices:
        print(notice, file=sys.stderr)
    if "peers" in parts:
        folders = dict(zip(sides.names, sides.folders, strict=True))
        with (
            lorakit_engine(sides.model, folders, rows=8) as own,
            vllm_engines(vllm, sides.model, folders) as others,
        ):
            show("8 prompts, 8 adapters", take_turns(sides.peers(own, others), rounds))
    if "http" in parts:
        with served(sides.engine) as address:
            client = Client(address, sides.tokens, sides.names)
            over = {
                "the engine itself": sides.engine_eight_adapters,
                "HTTP": lambda: client.ask(False),
                "HTTP, streamed": lambda: client.ask(True),
            }
            show("8 requests at once", take_turns(over, rounds))
            client.close()


def one_row(folder: Path, llama_cpp: Path | None, tokens: int, rounds: int) -> None:
    """One prompt after the other with one adapter, beside llama.cpp at the same precision."""
    name = folder.name
    tokenizer = AutoTokenizer.from_pretrained(resolve(MODEL).path)
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS[:2]]
    prompts = [prompt_tokens(turn, tokenizer) for turn in turns]
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = {name: folder}
        other = stack.enter_context(llama_cpp_engines(llama_cpp, MODEL, folders, place))
        sides: dict[str, Callable[[], int]] = {}
        for form, gguf, weights in (("bfloat16", "bfloat16", None), ("int8", "q8_0", "int8")):
            own = stack.enter_context(lorakit_engine(MODEL, folders, 1, weights))
            engines = {f"engine, {form}": own}
            if other:
                engines[f"llama.cpp, {gguf}"] = other[gguf]
            for title, engine in engines.items():
                sides[title] = partial(engine.answered, prompts, [name] * len(prompts), tokens)
        show("1 row, 1 adapter", take_turns(sides, rounds))


if __name__ == "__main__":
    main()
