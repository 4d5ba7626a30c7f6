"""A model with sliding windows behind the server: its adapters answer side by side."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from answered import alone
from layer_kinds import WINDOW, tiny_config
from lorakit.server.options import ServerOptions
from random_adapters import make_adapter
from served import running
from tiny import byte_tokenizer


def test_prompts_longer_than_the_window_are_answered_as_generate_answers_each(tmp_path: Path):
    base, tokenizer = tmp_path / "base", byte_tokenizer()
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(tiny_config("gemma3_text")).save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapters = {name: make_adapter(base, tmp_path / name, seed) for seed, name in enumerate("abcd")}
    prompt = "a prompt of more than eight tokens"
    ids = tokenizer(prompt)["input_ids"]
    assert len(ids) > 2 * WINDOW
    expected = {
        name: tokenizer.decode(alone(base, folder, ids, 16, [257]), skip_special_tokens=True)
        for name, folder in adapters.items()
    }
    assert len(set(expected.values())) == len(expected)
    options = ServerOptions(port=0)
    with running(base, adapters, options, max_rows=3) as served, ThreadPoolExecutor(4) as threads:
        asked = {
            name: threads.submit(served.complete, model=name, prompt=prompt, max_tokens=16)
            for name in adapters
        }
        found = {name: ask.result().json()["choices"][0]["text"] for name, ask in asked.items()}
        assert served.engine.notices == []
    assert found == expected
