"""Which variables a chat template reads that a user may set, such as Qwen 3's `enable_thinking`.

A variable that a template does not read changes nothing, so it is refused.
"""

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
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
    import jinja2
    from jinja2 import meta, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_GENERATION.sub("", template))
        found = meta.find_undeclared_variables(tree)
        # jinja2 counts a name that is set on some branches alone. It is a user's if the template
        # asks whether it is there, or gives it a default.
        own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
        asked = {
            name.name
            for test in tree.find_all(nodes.Test)
            if test.name in ("defined", "undefined")
            for name in test.find_all(nodes.Name)
        }
        for default in tree.find_all(nodes.Filter):
            if default.name in ("default", "d") and isinstance(default.node, nodes.Name):
                asked.add(default.node.name)
    except (jinja2.TemplateError, RecursionError) as error:
        raise InputError(f"the chat template cannot be parsed: {error}") from error
    return frozenset(found) - (own - asked) - _PROVIDED - environment.globals.keys()
