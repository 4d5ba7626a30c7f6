"""Greedy answers to many prompts, in batches.

What ends an answer is told in `lorakit.engine.sampling`, what is its reasoning in
`lorakit.data.answer_form`, and what it is worth in `metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from lorakit.data.answer_form import AnswerForm, answer_form
from lorakit.data.batches import LabelCollator
from lorakit.data.conversations import Message
from lorakit.data.grouping import cut
from lorakit.data.label_rows import LabelledRow
from lorakit.data.samples import Sample
from lorakit.data.seq2seq import prompt_tokens as encoder_tokens
from lorakit.engine.sampling import (
    end_tokens,
    generate,
    greedy_settings,
    pad_left,
    prompt_tokens,
    stops_at,
)
from lorakit.models.load import positions_of
from lorakit.progress import Task, innermost

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """An answer of a model, without the end mark.

    Attributes:
        text: all of it, without an empty reasoning block that the template writes.
        answer: what is compared with a reference: the text without reasoning at its beginning.
        reasoning: that reasoning, with its marks; mostly nothing.
    """

    text: str
    answer: str
    reasoning: str


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
    """The model's greedy answer to each conversation as it is written, reasoning included.

    Arguments and errors as `write_answers`.
    """
    return [
        written.text
        for written in write_answers(
            model,
            tokenizer,
            prompts,
            tools=tools,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_batch=on_batch,
        )
    ]


def write_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    tools: Sequence[Sequence[dict[str, Any]]] = (),
    max_new_tokens: int = 256,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[Written]:
    """The model's greedy answer to each conversation, in the order of `prompts`.

    Prompts of like length share a batch, padded on the left; the longest come first, so that a
    batch too large for the memory fails at once. A batch runs until its longest answer ends.

    Args:
        tools: of each conversation, those that the model is shown; none when left out.
        max_new_tokens: at most so many tokens an answer, and no more than the model has room for.
        batch_size: prompts at a time.
        on_batch: called after each batch with the number of its answers.

    Raises:
        InputError: the chat template refuses a conversation, or `max_new_tokens` is below 1.
    """
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    form = answer_form(tokenizer)
    ends = frozenset(end_tokens(model, tokenizer))
    positions = positions_of(model)
    shown = tools or [()] * len(prompts)
    rows = [prompt_tokens(p, tokenizer, own) for p, own in zip(prompts, shown, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    device = next(model.parameters()).device
    answers = [Written("", "", "")] * len(rows)
    was_training, work = model.training, innermost()
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            input_ids, mask = pad_left([rows[i] for i in chosen], int(settings.pad_token_id))
            width = input_ids.shape[1]
            if positions is not None:  # behind them some models have nothing to add to a token
                settings.max_new_tokens = max(1, min(max_new_tokens, positions - width))
            stops = stops_at(form.end_text, tokenizer, width, _steps(work, len(chosen), settings))
            output = generate(
                model,
                settings,
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                stopping_criteria=stops,
            )
            for i, tokens in zip(chosen, output[:, width:].tolist(), strict=True):
                answers[i] = _read(tokens, tokenizer, form, ends)
            if on_batch:
                on_batch(len(chosen))
    finally:
        model.train(was_training)
    return answers


def generate_targets(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """An encoder-decoder's greedy answer to each sample; arguments as in `write_answers`."""
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    settings.decoder_start_token_id = model.config.decoder_start_token_id  # type: ignore[union-attr]
    rows = [LabelledRow(encoder_tokens(s, tokenizer), [], s.where) for s in samples]
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


def _steps(work: Task, answers: int, settings: Any) -> Callable[[bool, int], None]:
    """Counts the steps of a batch as shares of its answers, and at its end the rest."""
    begun = work.done

    def step(ended: bool, tokens: int) -> None:
        share = 1.0 if ended else tokens / settings.max_new_tokens
        work.update(begun + answers * share)

    return step


def _read(
    tokens: list[int], tokenizer: PreTrainedTokenizerBase, form: AnswerForm, ends: frozenset[int]
) -> Written:
    own = list(takewhile(lambda token: token not in ends, tokens))
    text = form.shown(str(tokenizer.decode(own, skip_special_tokens=True)))
    # Some templates mark reasoning with special tokens, which are no part of the text.
    reasoning, answer = form.split(str(tokenizer.decode(own)))
    return Written(text, answer if reasoning else text, reasoning)
