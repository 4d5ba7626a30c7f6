"""Conversations to text: the tokenizer's own chat template, or a plain one where it has none.

A template is a small program that came with the model, so what it raises is turned into one
line. Which characters of the text are learned is decided in `lorakit.data.masking`.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.data.formats import Message
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + (message['role'] | capitalize) + ':\\n' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""What a base model without a template is trained with: headings, and the end token."""


def render(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as the model reads it; optionally up to where its answer begins.

    Raises:
        InputError: the template refuses the conversation, or there is no template.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; call ensure_template first")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is someone's program: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise InputError(
            f"the chat template refuses this conversation (roles: {roles}): {reason}"
        ) from error
    return str(text)


def ensure_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Set `PLAIN_TEMPLATE` on a tokenizer without a chat template.

    Returns one line that says so, for the user, or None when there was a template.
    """
    if tokenizer.chat_template:
        return None
    # Rendered text is tokenized without special tokens, so the template has to bring the BOS
    # of those tokenizers that would otherwise have added it.
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
    return (
        "the tokenizer has no chat template: using lorakit's plain one "
        "('### User:', '### Assistant:', answers end with "
        f"{tokenizer.eos_token or 'no end token'})"
    )


def template_sha256(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of the chat template, as 64 hexadecimal digits; of nothing when there is none."""
    template = tokenizer.chat_template or ""
    if not isinstance(template, str):  # several named templates
        template = json.dumps(template, sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()
