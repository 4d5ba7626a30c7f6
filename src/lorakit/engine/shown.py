"""A conversation as the text that the model continues, with all of it in there, or an error.

Templates are programs, and some leave out what they have no form for: tools, a system message, the
text beside a call. The model would answer as if it had never been said. Where the text alone does
not tell whether something is there, it is rendered once more with marks in its place.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lorakit.data.answer_form import KNOWN_REASONING
from lorakit.data.bounded_templates import isolated_templates
from lorakit.data.conversations import Message, text_of
from lorakit.data.spans import REASONING
from lorakit.data.templates import check_variables, mark_beside, render, template_source
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Place = tuple[str | int, ...]
"""Where something stands in a request: `("messages", 2, "content")`."""

_SURE = 64  # characters; what is shorter may stand in the text by chance
_MISSES = 8


class NotShownError(InputError):
    """The chat template leaves out a part of the conversation.

    Attributes:
        place: of the part.
    """

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place


def shown_text(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[dict[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    notices: Counter[str] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> str:
    """The conversation as text, up to where the model's answer begins.

    The reasoning of earlier turns is the template's to keep or to drop, if it reads reasoning.

    Args:
        tools: the descriptions of functions that the template shows to the model.
        variables: further ones of the template, such as `enable_thinking`.
        notices: counts conversations of which a part is left out, by what to say; None refuses
            them.
        add_generation_prompt: whether the template asks for an answer at the end.
        continue_final_message: the text ends with the last message, which the model goes on with.

    Raises:
        NotShownError: the template leaves a part out.
        InputError: it refuses the conversation, or does not read one of the variables.
    """
    variables = variables or {}
    try:
        check_variables(variables, tokenizer, tools)
    except InputError as error:
        raise NotShownError(("chat_template_kwargs",), str(error)) from error
    write: Callable[..., str] = partial(render, tokenizer=tokenizer, variables=dict(variables))
    if continue_final_message:
        write = partial(_open_ended, write)
    else:
        write = partial(write, add_generation_prompt=add_generation_prompt)
    with isolated_templates():
        text = write(messages, tools=tools)
        hidden = _reasoning(messages, template_source(tokenizer, tools))
    if (hidden := hidden or _hidden(messages, tools, text, write)) is not None:
        reason = _reason(hidden, messages)
        if notices is None:
            raise NotShownError(hidden, reason)
        notices[reason] += 1
    return text


def _open_ended(
    write: Callable[..., str], messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()
) -> str:
    """The conversation up to the end of its last message, which stays open.

    One that begins with its own reasoning mark stands where the template asks for an answer:
    templates would write an empty block of reasoning in front of it.

    Raises:
        InputError: the template refuses it, or does not show the last message.
    """
    *before, last = messages
    content = text_of(last.get("content"))
    mark = next((name for name, _ in KNOWN_REASONING if content.lstrip().startswith(name)), "")
    if mark:
        asked = write(before, tools=tools, add_generation_prompt=True)
        opened = asked.rstrip().endswith(mark)
        return asked + (content.lstrip()[len(mark) :].lstrip("\n") if opened else content)
    place = mark_beside(content)
    text, found, _ = write([*before, {**last, "content": place}], tools=tools).rpartition(place)
    if not found:
        raise InputError("the chat template does not show the last message, to go on with it")
    return text + content


def _reasoning(messages: Sequence[Message], template: str) -> Place | None:
    """The first reasoning, if the template reads none."""
    if any(known in template for known in REASONING):
        return None
    found = (
        ("messages", number, name)
        for number, message in enumerate(messages)
        for name in REASONING
        if message.get(name)
    )
    return next(found, None)


def _hidden(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    text: str,
    write: Callable[..., str],
) -> Place | None:
    """The first part that is not in the text; None if all are."""
    marks: list[Place] = []
    salt = str(10**11 + secrets.randbelow(9 * 10**11))

    def mark(*place: str | int) -> str:
        marks.append(place)
        return f"{salt}{len(marks) - 1:07d}"

    doubtful = _doubtful(messages, text)
    probe: list[Message] = []
    for number, message in enumerate(messages):
        changed = dict(message)
        if number in doubtful:
            changed["content"] = mark("messages", number, "content")
        if calls := message.get("tool_calls"):
            name = mark("messages", number, "tool_calls")
            changed["tool_calls"] = [_marked_call(calls[0], name), *calls[1:]]
        probe.append(changed)
    marked_tools = [
        {**tool, "function": {**tool["function"], "name": mark("tools", number)}}
        for number, tool in enumerate(tools)
    ]
    if not marks:
        return None
    try:
        probed = write(probe, tools=marked_tools)
    except InputError:  # it takes no marks for this; tools at least can be left out to compare
        if tools and text == _or_none(write, messages):
            return ("tools", 0)
        return None
    shown = {int(number) for number in re.findall(rf"{salt}(\d{{7}})", probed)}
    return next((place for number, place in enumerate(marks) if number not in shown), None)


def _doubtful(messages: Sequence[Message], text: str) -> set[int]:
    """The messages whose content is not certainly in the text.

    Templates write messages in their order, so each is looked for behind the one before: the text
    is read once, however many there are.
    """
    doubtful, at, misses = set[int](), 0, 0
    for number, message in enumerate(messages):
        content = text_of(message.get("content")).strip()
        if not content:
            continue
        found = text.find(content, at) if misses < _MISSES else -1
        if found < 0:
            misses += 1
            doubtful.add(number)
            continue
        at = found + len(content)
        if len(content) < _SURE:
            doubtful.add(number)
    return doubtful


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    arguments: Any = {mark: mark}
    if isinstance(call["function"].get("arguments"), str):
        arguments = json.dumps(arguments)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _or_none(write: Callable[..., str], messages: Sequence[Message]) -> str | None:
    try:
        return write(messages)
    except InputError:
        return None


def _reason(place: Place, messages: Sequence[Message]) -> str:
    if place[0] == "tools":
        return (
            "the chat template shows no tools, so that the model would not know of them: describe "
            "them in a message, or leave tools out"
        )
    message = messages[int(place[1])]
    if place[-1] in REASONING:
        return f"the chat template shows no reasoning, as {place[-1]} is: leave it out"
    if place[-1] == "tool_calls":
        return "the chat template shows no tool calls: write them into content, or leave them out"
    role = message["role"]
    beside = " beside tool calls" if message.get("tool_calls") else ""
    cure = "put its text into a user message" if role == "system" else "leave it out"
    return (
        f"the chat template does not show the content of a message of the role {role}{beside}, so "
        f"that the model would not read it: {cure}"
    )
