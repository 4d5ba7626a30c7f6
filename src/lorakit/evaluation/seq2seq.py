"""What an encoder-decoder answers, and what its answers' tokens cost: as for a causal model.

`evaluate.py` puts both beside the bare base; here is only what an encoder needs otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lorakit.data.batches import LabelCollator
from lorakit.data.grouping import cut
from lorakit.data.label_rows import LabelledRow
from lorakit.data.mixing import each
from lorakit.data.samples import Sample
from lorakit.data.seq2seq import prompt_tokens, tokenize_pair
from lorakit.engine.sampling import generate, greedy_settings
from lorakit.evaluation.loss import mean_over
from lorakit.models.label_loss import LabelLoss
from lorakit.models.load import most_tokens

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def generate_targets(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy answer to each sample's prompt; arguments as in `generate_answers`."""
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    settings.decoder_start_token_id = model.config.decoder_start_token_id  # type: ignore[union-attr]
    rows = [LabelledRow(prompt_tokens(s, tokenizer), [], s.where) for s in samples]
    collate = LabelCollator(int(tokenizer.pad_token_id))
    device = next(model.parameters()).device
    answers = [""] * len(rows)
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    for chosen in cut(order, batch_size):
        batch = collate([rows[i] for i in chosen])
        del batch["labels"]
        output = generate(model, settings, **{k: v.to(device) for k, v in batch.items()})
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
        if on_batch:
            on_batch(len(chosen))
    return answers


def target_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    max_length: int,
) -> list[LabelledRow]:
    """The rows that the loss of an encoder-decoder is taken over, each cut to `max_length`."""
    length = most_tokens(model, max_length)
    return each(samples, lambda sample: tokenize_pair(sample, tokenizer, length))


def mean_target_loss(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[LabelledRow],
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Cross-entropy in nats per token of the answers, over rows of `target_rows`."""
    collate, loss = LabelCollator(int(tokenizer.pad_token_id)), LabelLoss(model, targets=True)
    return mean_over(model, rows, collate, loss, batch_size, on_batch)
