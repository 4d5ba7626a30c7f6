"""The tokens of a prompt that the model in training answers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.data.masking import IGNORE, TokenizedRow
from lorakit.data.samples import Sample
from lorakit.data.templates import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PromptRow(TokenizedRow):
    """The tokens of a prompt up to where the answer begins, and the row that asks it.

    `number` tells it from all other prompts of a run.
    """

    sample: Sample | None = None
    number: int = -1


def prompt_row(
    sample: Sample, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> TokenizedRow:
    """The prompt of `sample`, without an answer that it may have.

    A prompt that leaves no room for an answer within `max_length` tokens is cut, so that its row is
    left out (`too_long.fitting`).
    """
    text = render(sample.prompt, tokenizer, add_generation_prompt=True, tools=sample.tools)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) >= max_length:
        kept = ids[:max_length]
        return TokenizedRow(kept, [IGNORE] * max_length, sample.where, len(ids) + 1 - max_length)
    return PromptRow(ids, [IGNORE] * len(ids), sample.where, sample=sample)
