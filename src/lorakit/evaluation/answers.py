"""Greedy answers to many prompts, in batches.

What ends an answer is told in `lorakit.inference.sampling`; what it is worth, in `metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.data.formats import Message
from lorakit.inference.sampling import generate, greedy_settings, pad_left, prompt_tokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    tools: Sequence[Sequence[dict[str, Any]]] = (),
    max_new_tokens: int = 256,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy answer to each conversation, in the order of `prompts`.

    Prompts of like length share a batch, padded on the left; the longest come first, so that a
    batch too large for the memory fails at once. A batch runs until its longest answer ends.

    Args:
        tools: of each conversation, those that the model is shown; none when left out.
        max_new_tokens: at most so many tokens an answer.
        batch_size: prompts at a time.
        on_batch: called after each batch with the number of its answers.

    Raises:
        InputError: the chat template refuses a conversation, or `max_new_tokens` is below 1.
    """
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    shown = tools or [()] * len(prompts)
    rows = [prompt_tokens(p, tokenizer, own) for p, own in zip(prompts, shown, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    device = next(model.parameters()).device
    answers = [""] * len(rows)
    was_training = model.training
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            input_ids, mask = pad_left([rows[i] for i in chosen], int(settings.pad_token_id))
            output = generate(
                model,
                settings,
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
            )
            written = output[:, input_ids.shape[1] :]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
            if on_batch:
                on_batch(len(chosen))
    finally:
        model.train(was_training)
    return answers
