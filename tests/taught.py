"""Tiny models that were taught what to say, so that a test knows the text of each answer."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.lora import LoraConfig, LoraModel
from tiny import save_tiny_model

CONTEXT = 8192

PROMPT = "Where is my order?"
# What each answers to it, if greedy. The adapters can only use letters that the base has learnt.
BASE_SAYS = "I am the base, <b>bold</b>, <script>alert(1)</script> and\n  so on"
SHOP_SAYS = "so the shop <b>sold</b> it,\n  and on time"
ENDLESS_SAYS = "no end "  # again and again


def save_taught_models(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Writes a base and its adapters `shop` and `endless` below `folder`; gives their folders."""
    base = save_tiny_model(folder / "taught-base")
    config = base / "config.json"
    fields = json.loads(config.read_text()) | {"max_position_embeddings": CONTEXT}
    config.write_text(json.dumps(fields))
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    _teach(model, tokenizer, model.parameters(), BASE_SAYS + tokenizer.eos_token)
    model.save_pretrained(base)
    model.requires_grad_(False)
    adapters = {}
    says = {"shop": SHOP_SAYS + tokenizer.eos_token, "endless": ENDLESS_SAYS * 24}
    for name, text in says.items():
        adapters[name] = folder / name
        lora = LoraModel(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        _teach(lora, tokenizer, (p for p in lora.parameters() if p.requires_grad), text)
        lora.save_pretrained(adapters[name])
        lora.unload()
    return base, adapters


def _teach(model: Any, tokenizer: Any, parameters: Iterable[torch.Tensor], text: str) -> None:
    """Trains until `model` is sure of every token of `text` as the answer to the prompt."""
    turn = [{"role": "user", "content": PROMPT}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)
    answer = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    tokens = torch.cat([torch.tensor([asked["input_ids"]]), answer], dim=1)
    optimizer = torch.optim.Adam(parameters, lr=5e-3)
    for _ in range(500):
        logits = model(input_ids=tokens).logits[0, -answer.shape[1] - 1 : -1]
        losses = torch.nn.functional.cross_entropy(logits, answer[0], reduction="none")
        if losses.max() < 0.3:
            return
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    raise AssertionError(f"the model did not learn to say {text!r}")
