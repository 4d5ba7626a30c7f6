"""Which variables a chat template reads that a user may set, such as Qwen 3's `enable_thinking`.

A variable that a template does not read changes nothing, so it is refused.
"""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lorakit.data.bounded_templates import (
    TemplateFailedError,
    TemplateTimeoutError,
    free_variables,
)
from lorakit.errors import InputError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROVIDED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")
)


def template_source(tokenizer: "PreTrainedTokenizerBase", tools: bool = False) -> str:
    """The template that a conversation is rendered with, `tools` where functions are shown."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return str(template.get("tool_use" if tools else "default", template.get("default", "")))
    return template or ""


def check_variables(
    variables: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", tools: bool = False
) -> None:
    """Refuses variables that the template does not read, and those that are not the user's to set.

    Raises:
        InputError: it names the first of them, and what there is to set.
    """
    if not variables:
        return
    known = template_variables(template_source(tokenizer, tools)) - {
        *tokenizer.special_tokens_map,
        *inspect.signature(type(tokenizer).apply_chat_template).parameters,
    }
    for name in variables:
        if name not in known:
            there = f"it reads {listed(sorted(known))}" if known else "it reads none"
            raise InputError(
                f"the chat template does not read {name[:100]!r}, so that it would change "
                f"nothing: {there}"
            )


@lru_cache(maxsize=64)
def template_variables(template: str) -> frozenset[str]:
    """The variables that a template reads and does not set itself, without the conversation's.

    Raises:
        InputError: the template cannot be parsed.
    """
    try:
        return free_variables(template) - _PROVIDED
    except (TemplateFailedError, TemplateTimeoutError) as error:
        raise InputError(f"the chat template cannot be parsed: {error}") from error
