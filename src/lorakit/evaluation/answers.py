"""Greedy answers to many prompts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.data.formats import Message
from lorakit.data.templates import render

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy answer to each conversation, in the order of `prompts`.

    Prompts of like length share a batch, padded on the left; the longest come first, so that a
    batch too large for the memory fails at once.

    Args:
        max_new_tokens: at most so many tokens an answer.
        on_batch: called with the number of answers that a batch brought.
    """
    import torch

    ids = [
        tokenizer(render(p, tokenizer, add_generation_prompt=True), add_special_tokens=False)
        for p in prompts
    ]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]["input_ids"]))
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    answers = [""] * len(ids)
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    try:
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            batch: Any = tokenizer.pad([ids[i] for i in chosen], return_tensors="pt")
            batch = {k: batch[k].to(_device(model)) for k in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                output = model.generate(**batch, generation_config=settings)  # type: ignore[operator]
            new = output[:, batch["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
            if on_batch:
                on_batch(len(chosen))
    finally:
        model.train(was_training)
        tokenizer.padding_side = side
    return answers


def greedy_settings(
    model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Greedy decoding that ends at the model's or the tokenizer's end token.

    A fresh configuration: the model's own may hold sampling settings.
    """
    from transformers import GenerationConfig

    own = model.generation_config.eos_token_id
    ends = [own] if isinstance(own, int) else list(own or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def _device(model: nn.Module) -> Any:
    return next(model.parameters()).device
