"""A chat template as the few strings around its messages, found by rendering it and then proved.

Jinja templates are programs, and other programs want them in their own language. Most write every
turn between two fixed strings. Those strings are read off from rendered conversations, put
together again by a renderer of a few lines, and compared on other conversations: a template that
does anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from lorakit.data.conversations import Message
from lorakit.data.template_clock import reads_clock
from lorakit.data.templates import render
from lorakit.errors import InputError, listed
from lorakit.models.template_files import default_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAMILIES = {
    "ChatML": "<|im_start|>",
    "Llama 3": "<|start_header_id|>",
    "Mistral": "[INST]",
    "Gemma": "<start_of_turn>",
    "Phi": "<|user|>",
    "lorakit's plain template": "### User:",
}
"""What stands in front of a user's turn, by which a family is known."""

_Text = Callable[..., str]
"""Renders messages whose first letters say their roles."""

_S, _U1, _A1, _U2 = "Ssystem0", "Uuser1", "Aassistant1", "Uuser2"


@dataclass(frozen=True)
class ChatForm:
    """The strings before and after a message of each role, and what asks for an answer.

    `system` is None where the template takes no system message, or puts it before the content of
    a user's turn: the `folded` one, with `separator` behind it. `default_system` is what the
    template says when there is none. `trims` is whether it takes off space around messages.
    """

    family: str
    head: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    system: tuple[str, str] | None = None
    folded: Literal["first", "last"] | None = None
    separator: str = ""
    default_system: str | None = None
    trims: bool = False

    @property
    def takes_system(self) -> bool:
        """Whether a system message is rendered at all."""
        return self.system is not None or self.folded is not None

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation up to where the answer begins."""
        messages = list(messages)
        system = self.default_system
        if messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
        text = self.head
        if self.system and system is not None:
            text += self.system[0] + system + self.system[1]
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        carrier = {"first": users[0], "last": users[-1]}.get(self.folded or "")
        for i, message in enumerate(messages):
            before, after = self.user if message["role"] == "user" else self.assistant
            inside = f"{system}{self.separator}" if i == carrier and system is not None else ""
            text += before + inside + message["content"] + after
        return text + self.generation


def chat_form(tokenizer: PreTrainedTokenizerBase, bos: bool) -> ChatForm:
    """The form of the tokenizer's chat template.

    Args:
        bos: whether the other program puts the BOS token first itself, so that it is left out.

    Raises:
        InputError: there is no template, or it is of no family that has such a form.
    """
    templates: Any = tokenizer.chat_template
    if (template := default_of(templates)) is None:
        raise InputError("the tokenizer has no chat template: it cannot be translated")
    lead = str(tokenizer.bos_token) if bos else ""

    def text(*messages: str, ask: bool = True) -> str:
        roles = {"S": "system", "U": "user", "A": "assistant"}
        rows: list[Message] = [{"role": roles[m[0]], "content": m} for m in messages]
        rendered = render(rows, tokenizer, add_generation_prompt=ask)
        if not rendered.startswith(lead):
            raise InputError(
                f"the chat template does not begin with {lead}, which its tokenizer adds: other "
                "programs would read other tokens"
            )
        return rendered.removeprefix(lead)

    try:
        if reads_clock(template):
            raise _NotOfThisForm("it writes the date of the day")
        form = _read_off(text)
        _prove(form, tokenizer, lead)
    except _NotOfThisForm as error:
        raise InputError(
            f"the chat template cannot be translated ({error}): lorakit knows {listed(FAMILIES)}. "
            "Write the TEMPLATE yourself, or use --to gguf, which carries the Jinja template"
        ) from error
    return form


class _NotOfThisForm(Exception):  # noqa: N818 (no error of the user's)
    """What the template does that a form cannot say."""


def _read_off(text: _Text) -> ChatForm:
    asked, bare = text(_U1), text(_U1, ask=False)
    generation = _cut(asked, bare, "")
    before, after_user = _split(bare, _U1)
    answered, more = text(_U1, _A1, ask=False), text(_U1, _A1, _U2)
    _, rest = _split(answered, _U1)
    between, after_assistant = _split(rest, _A1)
    before_assistant = _cut(between, after_user, "")
    middle, _ = _split(_split(more, _A1)[1], _U2)
    before_user = _cut(middle, after_assistant, "")
    head = _cut(before, "", before_user)
    family = next((name for name, mark in FAMILIES.items() if mark in before_user), None)
    if family is None:
        raise _NotOfThisForm(f"a user's turn begins with {before_user!r}")
    form = ChatForm(
        family,
        head,
        (before_user, after_user),
        (before_assistant, after_assistant),
        generation,
        trims=text(f"{_U1} ") == asked,
    )
    return _with_system(form, text)


def _with_system(form: ChatForm, text: _Text) -> ChatForm:
    try:
        with_system = text(_S, _U1, _A1, _U2)
    except InputError:
        return form  # it refuses system messages
    if _S not in with_system:
        return form
    before, rest = _split(with_system, _S)
    own = form.user[0]
    if _U1 not in rest:
        return replace(form, folded="last", separator=_split(rest, _U2)[0])
    between = _split(rest, _U1)[0]
    if between.endswith(own) and before != form.head + own:
        system = before, _cut(between, "", own)
        if form.head.startswith(system[0]) and form.head.endswith(system[1]) and form.head:
            default = form.head[len(system[0]) : len(form.head) - len(system[1])]
            return replace(form, head="", system=system, default_system=default)
        return replace(form, system=(_cut(before, form.head, ""), system[1]))
    return replace(form, folded="first", separator=between)


def _prove(form: ChatForm, tokenizer: PreTrainedTokenizerBase, lead: str) -> None:
    """Compares the form with the template on conversations that it was not read off from."""
    words = ["Who wrote «Faust»?", "Goethe.\n\n- part 1\n- part 2", "1 + 1 = {x}", "2", "Danke"]
    turns: list[Message] = [
        {"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)
    ]
    starts: list[list[Message]] = [[]]
    if form.takes_system:
        starts.append([{"role": "system", "content": "Answer in one line."}])
    for start in starts:
        for length in (1, 3, 5):
            messages = start + turns[:length]
            expected = render(messages, tokenizer, add_generation_prompt=True)
            if lead + form.render(messages) != expected:
                raise _NotOfThisForm("turns are not written each between two fixed strings")


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise _NotOfThisForm("it leaves out messages, or writes them twice")
    before, _, after = text.partition(mark)
    return before, after


def _cut(text: str, start: str, end: str) -> str:
    """`text` without what it begins and ends with."""
    if len(start) + len(end) > len(text) or not (text.startswith(start) and text.endswith(end)):
        raise _NotOfThisForm("what stands around a turn depends on the turns beside it")
    return text[len(start) : len(text) - len(end)]
