"""Rows for encoder-decoder models: the encoder reads the prompt, the decoder learns the answer.

There is no chat template in between: what a row asks is the text that the encoder reads.
"""

from typing import TYPE_CHECKING

from lorakit.data.label_rows import LabelledRow
from lorakit.data.masking import end_token
from lorakit.data.samples import Sample
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_text(sample: Sample) -> str:
    """What the encoder reads: the question, behind the system message if there is one.

    Raises:
        InputError: the row is plain text, or a conversation of several turns.
    """
    roles = [message["role"] for message in sample.messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        what = "plain text" if sample.text is not None else f"a conversation ({', '.join(roles)})"
        raise InputError(
            f"{sample.where}: {what}, and SEQ_2_SEQ_LM learns one answer to one question: "
            "give rows with prompt and completion"
        )
    if sample.pictures:
        raise InputError(
            f"{sample.where}: has pictures, which a SEQ_2_SEQ_LM does not read: remove them, or "
            "give a vision-language model"
        )
    return "\n".join(message["content"] for message in sample.prompt)


def tokenize_pair(
    sample: Sample, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> LabelledRow:
    """Prompt and answer as token ids, each cut from the right to `max_length` tokens.

    The labels are the whole answer with the end-of-sequence token, which is where it ends.

    Raises:
        InputError: as in `prompt_text`, or the tokenizer has no end-of-sequence token.
    """
    end = end_token(tokenizer)
    ids = prompt_tokens(sample, tokenizer)
    labels = list(tokenizer(text_target=sample.reference, verbose=False)["input_ids"])
    if labels[-1:] != [end]:
        labels.append(end)
    longest = max(len(ids), len(labels))
    ids, labels = ids[:max_length], labels[:max_length]
    cut = longest - len(ids) if longest > max_length else 0
    return LabelledRow(ids, labels, sample.where, cut)


def prompt_tokens(sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The prompt as the encoder reads it, with the tokenizer's own special tokens."""
    ids = list(tokenizer(prompt_text(sample), verbose=False)["input_ids"])
    return ids or [tokenizer.eos_token_id]
