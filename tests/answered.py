"""Answers of an engine, and what each adapter alone answers by `generate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import lorakit
from lorakit.data.conversations import Message
from lorakit.engine.requests import Ticket
from lorakit.engine.sampling import generate
from lorakit.evaluation.answers import write_answers
from lorakit.lora import LoraModel


def tokens(ticket: Ticket) -> list[int]:
    """The tokens of an answer for which log-probabilities were asked for."""
    return [chosen.token for piece in ticket for chosen in piece.logprobs]


def text(ticket: Ticket) -> str:
    return "".join(piece.text for piece in ticket)


def alone(
    base: Path, adapter: Path | None, prompt: Sequence[int], new_tokens: int, ends: Sequence[int]
) -> list[int]:
    """The greedy answer of one adapter by itself, by `generate`, with the end token if it ends."""
    model, _ = lorakit.load_model(str(base), "float32")
    if adapter is not None:
        model = LoraModel.from_pretrained(model, adapter)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, eos_token_id=list(ends) or None, pad_token_id=0
    )
    ids = torch.tensor([list(prompt)])
    found = generate(model.eval(), settings, input_ids=ids, attention_mask=torch.ones_like(ids))
    return found[0, len(prompt) :].tolist()


def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[Message]], **options: Any
) -> list[str]:
    """The texts of `write_answers`, reasoning included."""
    return [written.text for written in write_answers(model, tokenizer, prompts, **options)]
