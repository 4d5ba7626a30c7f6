"""Answers of an engine, and what each adapter alone answers by `generate`."""

from collections.abc import Iterable, Mapping, Sequence
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
    adapters = {} if adapter is None else {"own": adapter}
    [found] = each_alone(base, adapters, [(prompt, next(iter(adapters), None))], new_tokens, ends)
    return found


def each_alone(
    base: Path,
    adapters: Mapping[str, Path],
    asked: Iterable[tuple[Sequence[int], str | None]],
    new_tokens: int,
    ends: Sequence[int] = (257,),
) -> list[list[int]]:
    """`alone` of several prompts, each with the name of its adapter; a model for each adapter."""
    settings = GenerationConfig(
        max_new_tokens=new_tokens, eos_token_id=list(ends) or None, pad_token_id=0
    )
    models: dict[str | None, Any] = {}
    found = []
    for prompt, name in asked:
        if name not in models:
            model, _ = lorakit.load_model(str(base), "float32")
            models[name] = (
                model if name is None else LoraModel.from_pretrained(model, adapters[name])
            )
        ids = torch.tensor([list(prompt)])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answer = generate(models[name].eval(), settings, **given)
        found.append(answer[0, len(prompt) :].tolist())
    return found


def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[Message]], **options: Any
) -> list[str]:
    """The texts of `write_answers`, reasoning included."""
    return [written.text for written in write_answers(model, tokenizer, prompts, **options)]
