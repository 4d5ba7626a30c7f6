"""Greedy answers to many prompts.

A model with adapters answers on the engine, where a row that has ended makes room for the next one;
any other in batches that `generate` writes. `engine.sampling` knows what ends an answer,
`data.answer_form` what is reasoning in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

from lorakit.data.answer_form import AnswerForm, answer_form
from lorakit.data.batches import LabelCollator
from lorakit.data.conversations import Message
from lorakit.data.label_rows import LabelledRow
from lorakit.data.masking import TokenizedRow
from lorakit.data.samples import Sample
from lorakit.data.seq2seq import prompt_tokens as encoder_tokens
from lorakit.engine.picture_prompt import picture_inputs, prompt_row
from lorakit.engine.rows_at_once import FEW_ROWS, MAX_ROWS
from lorakit.engine.sampler import Sampler, answering, is_sharded
from lorakit.engine.sampling import (
    Sampling,
    end_tokens,
    generate,
    greedy_settings,
    pad_left,
    prompt_text,
    stops_at,
)
from lorakit.evaluation.held_out import evaluating, longest_first
from lorakit.lora import LoraModel
from lorakit.models.load import positions_of
from lorakit.models.loaded import base_model
from lorakit.models.padding import takes_left_padding
from lorakit.progress import innermost

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """An answer of a model, without the end mark.

    Attributes:
        text: all of it, without an empty reasoning block that the template writes.
        answer: what is compared with a reference: the text without reasoning at its beginning.
        reasoning: that reasoning, with its marks; mostly nothing.
        tokens: of all of it, before the end token.
    """

    text: str
    answer: str
    reasoning: str = ""
    tokens: int = 0


def answer_samples(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], **options: Any
) -> list[Written]:
    """The greedy answer to each sample's prompt, of a causal model or an encoder-decoder.

    Options and errors as in `write_answers`.
    """
    if getattr(base_model(model).config, "is_encoder_decoder", False):
        return _write_targets(model, tokenizer, samples, **options)
    prompts, tools = [sample.prompt for sample in samples], [sample.tools for sample in samples]
    return write_answers(model, tokenizer, prompts, tools=tools, **options)


def write_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    tools: Sequence[Sequence[dict[str, Any]]] = (),
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Written]:
    """The model's greedy answer to each conversation, in the order of `prompts`.

    Where `generate` writes them prompts of like length share a batch, padded on the left, or
    prompts of one length where a model's answers change behind padding.

    Args:
        tools: of each conversation, those that the model is shown; none when left out.
        max_new_tokens: the most tokens of an answer, and no more than the model has room for.
        batch_size: answers that are written at once; None for as many as the memory holds, at most
            64, and 16 where `generate` writes them.
        on_batch: called after each batch with the number of its answers.

    Raises:
        InputError: the chat template refuses a conversation, or `max_new_tokens` is below 1.
        LorakitError: the model failed.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens)
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    form = answer_form(tokenizer)
    ends = frozenset(end_tokens(model, tokenizer))
    positions, work = positions_of(model), innermost()
    shown = tools or [()] * len(prompts)
    rows = [
        prompt_row(prompt_text(p, tokenizer, own), p, tokenizer)
        for p, own in zip(prompts, shown, strict=True)
    ]
    if isinstance(model, LoraModel) and not is_sharded(model):
        with answering(model) as route:
            written = Sampler(model, tokenizer).write(
                [row.input_ids for row in rows],
                [sampling] * len(rows),
                route,
                work,
                pictures=[row.pictures for row in rows],
                most=batch_size or MAX_ROWS,
            )
        if on_batch and rows:
            on_batch(len(rows))
        return [_read(row.tokens, tokenizer, form, ends) for row in written]

    def collate(rows: list[TokenizedRow]) -> dict[str, torch.Tensor]:
        input_ids, mask = pad_left([row.input_ids for row in rows], int(settings.pad_token_id))
        pictures = picture_inputs(rows, input_ids.shape[1])
        return {"input_ids": input_ids, "attention_mask": mask, **pictures}

    def answers(batch: dict[str, torch.Tensor]) -> list[Written]:
        (several, width), begun = batch["input_ids"].shape, work.done
        if positions is not None:  # after them some models have nothing to add to a token
            settings.max_new_tokens = max(1, min(max_new_tokens, positions - width))

        def count(ended: bool, tokens: int) -> None:
            """A step of a batch is a share of its answers; its last step is all the rest."""
            work.update(begun + several * (1.0 if ended else tokens / settings.max_new_tokens))

        stops = stops_at(form.end_text, tokenizer, width, count)
        output = generate(model, settings, stopping_criteria=stops, **batch)
        return [_read(tokens, tokenizer, form, ends) for tokens in output[:, width:].tolist()]

    batches = longest_first(rows, batch_size or FEW_ROWS)
    if len({len(row) for row in rows}) > 1 and not takes_left_padding(model):
        batches = [
            list(alike)
            for batch in batches
            for _, alike in groupby(batch, key=lambda i: len(rows[i]))
        ]
    return _in_batches(model, rows, batches, on_batch, collate, answers)


def _write_targets(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Written]:
    """An encoder-decoder's greedy answer to each sample; arguments as in `write_answers`."""
    settings = greedy_settings(model, tokenizer, max_new_tokens)
    settings.decoder_start_token_id = model.config.decoder_start_token_id  # type: ignore[union-attr]
    rows = [LabelledRow(encoder_tokens(s, tokenizer), [], s.where) for s in samples]
    collate = LabelCollator(int(tokenizer.pad_token_id))

    def answers(batch: dict[str, torch.Tensor]) -> list[Written]:
        import torch

        del batch["labels"]
        output = generate(model, settings, **batch)
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        special = torch.tensor(tokenizer.all_special_ids, device=output.device)
        lengths = (~torch.isin(output, special)).sum(1).tolist()
        return [Written(t, t, tokens=n) for t, n in zip(texts, lengths, strict=True)]

    batches = longest_first(rows, batch_size or FEW_ROWS)
    return _in_batches(model, rows, batches, on_batch, collate, answers)


def _in_batches(
    model: nn.Module,
    rows: Sequence[Any],
    batches: Sequence[list[int]],
    on_batch: Callable[[int], None] | None,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    answers: Callable[[dict[str, torch.Tensor]], list[Written]],
) -> list[Written]:
    found = [Written("", "")] * len(rows)
    for chosen, batch in evaluating(model, rows, batches, collate):
        for i, written in zip(chosen, answers(batch), strict=True):
            found[i] = written
        if on_batch:
            on_batch(len(chosen))
    return found


def _read(
    tokens: list[int], tokenizer: PreTrainedTokenizerBase, form: AnswerForm, ends: frozenset[int]
) -> Written:
    own = list(takewhile(lambda token: token not in ends, tokens))
    text = form.shown(str(tokenizer.decode(own, skip_special_tokens=True)))
    # Some templates mark reasoning with special tokens, which are no part of the text.
    reasoning, answer = form.split(str(tokenizer.decode(own)))
    return Written(text, answer if reasoning else text, reasoning, len(own))
