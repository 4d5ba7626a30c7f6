"""Conversations to text: the tokenizer's own chat template, or a plain one where it has none.

A template is a small program that came with the model, so what it raises is turned into one
line. Which characters of the text are learned is decided in `lorakit.data.spans`.
"""

import inspect
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any

from lorakit.data.bounded_templates import (
    TemplateFailedError,
    TemplateTimeoutError,
    apply_template,
    free_variables,
)
from lorakit.data.conversations import IMAGE, Message
from lorakit.data.template_clock import show_clock
from lorakit.errors import InputError, LorakitError, listed
from lorakit.models.picture_reader import reader_of
from lorakit.models.template_files import default_of, digest

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
    tools: Sequence[dict[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the model reads it; optionally up to where its answer begins.

    `variables` are further ones of the template, such as `enable_thinking`.

    Tool calls are given to the template as they are. If it cannot write them so, it gets them
    with what some templates insist on: ids of nine letters and digits (Mistral's) in place of
    others (OpenAI's `call_1`) or of none, arguments as JSON text instead of an object (DeepSeek's).

    Raises:
        InputError: the template refuses the conversation, or there is no template.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; call ensure_template first")
    show_clock(template_source(tokenizer, tools))
    refusal: Exception | None = None
    has_calls = any(message.get("tool_calls") for message in messages)

    def write(conversation: Sequence[Message]) -> str:
        return apply_template(
            tokenizer,
            conversation,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **(variables or {}),
        )

    for conversation in _spellings(messages, tokenizer):
        try:
            text = write(conversation)
        except LorakitError:  # it takes too long, or nothing can be rendered
            raise
        except Exception as error:  # a template is someone's program: it may raise anything
            refusal = refusal or error
            continue
        if not has_calls or not _shows_python(text, conversation, write):
            return text
    if refusal is None:
        raise InputError("the chat template does not write the arguments of tool calls as JSON")
    reason = " ".join(str(refusal).split()) or type(refusal).__name__
    roles = ", ".join(message["role"] for message in messages) or "none"
    raise InputError(
        f"the chat template refuses this conversation (roles: {roles}): {reason}"
    ) from refusal


def as_shown(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", token: str
) -> list[Message]:
    """Messages as the template of a model that reads pictures takes their content.

    Most of them go through parts, also of a text alone; one that reads texts gets `token` in the
    place of each picture.
    """
    if _reads_parts(template_source(tokenizer)):
        return [
            {**message, "content": [{"type": "text", "text": content}]}
            if isinstance(content := message.get("content"), str)
            else message
            for message in messages
        ]
    return [
        {
            **message,
            "content": "".join(
                token if part["type"] == IMAGE else part["text"] for part in message["content"]
            ),
        }
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


@lru_cache(maxsize=64)
def _reads_parts(template: str) -> bool:
    """Whether a template looks at the types of a content's parts."""
    return bool(re.search(r"""\[?['".]type\b""", template)) and IMAGE in template


def template_source(tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] = ()) -> str:
    """Of templates with names, the one that transformers takes; empty where there is none."""
    templates: Any = tokenizer.chat_template
    if isinstance(templates, dict) and tools and "tool_use" in templates:
        return str(templates["tool_use"])
    return default_of(templates) or ""


def _spellings(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[list[Message]]:
    """The conversation, and as long as none is taken, its tool calls written otherwise."""
    if (reader := reader_of(tokenizer)) is not None:
        messages = as_shown(messages, tokenizer, reader.token)
    yield list(messages)
    if any(message.get("tool_calls") for message in messages):
        yield _with_ids(messages)
        yield _with_json_arguments(messages)
        yield _with_json_arguments(_with_ids(messages))


_NINE = re.compile(r"[A-Za-z0-9]{9}")


def _with_ids(messages: Sequence[Message]) -> list[Message]:
    """Calls get ids of nine letters and digits by their place, but for those that have such ids.

    The results that follow get the same ones: by the id that they name, else by their order.
    """
    numbers = count(1)
    changed: list[Message] = []
    new_ids: dict[str, str] = {}
    waiting: OrderedDict[str, None] = OrderedDict()
    for message in messages:
        if calls := message.get("tool_calls"):
            renamed = []
            for call in calls:
                own, new = str(call.get("id") or ""), f"call{next(numbers):05d}"
                renamed.append({**call, "id": own if _NINE.fullmatch(own) else new})
                if own:
                    new_ids[own] = renamed[-1]["id"]
            waiting = OrderedDict.fromkeys(call["id"] for call in renamed)
            message = {**message, "tool_calls": renamed}
        elif message["role"] == "tool":
            named = new_ids.get(str(message.get("tool_call_id") or ""))
            if named is not None:
                waiting.pop(named, None)
            elif waiting:
                named, _ = waiting.popitem(last=False)
            message = {**message, "tool_call_id": named} if named else message
        changed.append(message)
    return changed


def _with_json_arguments(messages: Sequence[Message]) -> list[Message]:
    def as_text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return _with_calls(messages, as_text)


def _with_calls(
    messages: Sequence[Message], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[Message]:
    return [
        {**message, "tool_calls": [change(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _shows_python(
    text: str, messages: Sequence[Message], write: Callable[[Sequence[Message]], str]
) -> bool:
    """Whether arguments were printed as a Python object, `{'a': True}`, and not as JSON.

    Only where the text has more of such beginnings than the messages brought is the conversation
    written again, with arguments that can be told from everything else in it.
    """
    brought = sum(str(message.get("content")).count("{'") for message in messages)
    if text.count("{'") <= brought:
        return False
    mark = mark_beside(text)

    def marked(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"]["arguments"]
        if not arguments or isinstance(arguments, str):
            return call
        return {**call, "function": {**call["function"], "arguments": {mark: mark}}}

    try:
        return f"{{'{mark}'" in write(_with_calls(messages, marked))
    except LorakitError:
        raise
    except Exception:  # it insists on arguments of its own
        return True


def mark_beside(text: str) -> str:
    """Digits that are not in `text`; they survive upper-casing, trimming and JSON quoting."""
    mark = "7310582946"
    while mark in text:
        mark += mark[-3]
    return mark


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
    templates: Any = tokenizer.chat_template
    return digest(templates)


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Matches the name of any special token, the longest where one begins another."""
    return _special_tokens(tokenizer, len(tokenizer))


@lru_cache(maxsize=2)
def _special_tokens(tokenizer: "PreTrainedTokenizerBase", size: int) -> re.Pattern[str]:
    """As `special_tokens`; `size` renews it when tokens were added."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    # Without special tokens nothing may match, the empty string least of all.
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


_PROVIDED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")
)


def check_variables(
    variables: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] = ()
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
                f"the chat template does not read {name[:100]!r}, so it would have "
                f"no effect: {there}"
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
