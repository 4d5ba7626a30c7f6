"""Where the answers stand in a rendered conversation, for any chat template.

Templates are programs, and few of them mark the assistant's part. So the answers are found from
outside, by rendering: what precedes an answer is what the template gives with
`add_generation_prompt`, and what follows it is what stays behind a mark put in its place. Which
tokens that makes is decided in `lorakit.data.masking`.
"""

import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from lorakit.data.conversations import Message
from lorakit.data.templates import mark_beside, render, special_tokens
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The names under which datasets and templates keep what a model thought before it answered."""


@dataclass(frozen=True, slots=True)
class Answers:
    """A rendered conversation, and the characters `[start, end)` of it that are learned.

    Each span runs from where the model starts to write through the special token that ends the
    turn; whitespace behind that token is left out. `ended` tells whether the last answer has
    such a token; if not, the text ends with the answer. `unshown` names what the template left
    out of the text: the roles of such messages (of an answer that may be its reasoning alone),
    `tools`, and `prompt` where the last answer does not stand behind what the template writes
    when it asks for one (DeepSeek-R1's `<think>`).
    """

    text: str
    spans: list[Span]
    ended: bool
    unshown: tuple[str, ...] = ()


def find_answers(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[dict[str, Any]] = (),
    unlearned: Container[int] = (),
) -> Answers:
    """Render `messages`, the last of which is an answer, and find the answers in the text.

    A tool call is an answer like any other. Where no special token ends answers but the next
    message begins with one (GLM's `<|user|>` and `<|observation|>`), a model stops by writing
    that one, so it is learned.

    Args:
        unlearned: positions of answers that are only read, and not looked for.

    Raises:
        InputError: the template refuses the conversation, or does not write an answer or a tool
            call where one is, or writes it where it cannot be found.
    """
    write = partial(render, tokenizer=tokenizer, tools=tools)
    full = write(messages)
    mark = mark_beside(full)
    special = special_tokens(tokenizer)
    last = len(messages) - 1
    last_marked = write([*messages[:last], _plain(messages[last], mark)])
    plain_end = last_marked.rpartition(mark)[2]
    token = special.search(plain_end)
    end_token = token.group() if token else ""
    closing = plain_end[: token.end()] if token else plain_end.rstrip()

    spans: dict[int, Span] = {}
    for turn, message in enumerate(messages):
        if message["role"] != "assistant" or turn in unlearned:
            continue
        opening = _opening(messages[:turn], write)
        start: int | None = len(opening)
        if not opening or not full.startswith(opening):
            start = _start(messages, turn, full, mark, write, opening)
        if message.get("tool_calls"):
            own, rest = _behind_calls(messages, turn, mark, write, end_token)
        else:
            marked = last_marked
            if turn != last:
                marked = write([*messages[:turn], _plain(message, mark), *messages[turn + 1 :]])
            after = marked.rpartition(mark)[2]
            if marked.count(mark) != 1 or not full.endswith(after):
                start = None
            own = closing if after.startswith(closing) else ""  # some close the last turn only
            rest = after[len(own) :]
        end = len(full) - len(rest)
        if start is None or start > end - len(own) or not full.endswith(rest):
            raise InputError(
                f"the chat template cannot be masked: the position of message {turn + 1}, "
                "an answer, in the rendered text is not clear; use another template or tokenizer"
            )
        if not end_token and (begins_next := special.match(rest)):
            end += begins_next.end()
        spans[turn] = (start, end)
    # `own` and `opening` are now what the last answer ends with and what asks for it.
    ended = any(match.end() == len(own) for match in special.finditer(own))
    unshown = _unshown(messages, full, spans)
    if tools and _ignores_tools(messages, tokenizer, full):
        unshown += ("tools",)
    if not full.startswith(opening):
        unshown += ("prompt",)
    return Answers(full if ended else full[:end], list(spans.values()), ended, unshown)


def _plain(message: Message, mark: str) -> Message:
    """An answer that says `mark` instead of what `message` says or calls."""
    return {k: v for k, v in message.items() if k != "tool_calls"} | {"content": mark}


def _opening(before: Sequence[Message], write: Callable[..., str]) -> str:
    """What the model is asked to continue; nothing where the template refuses to ask."""
    try:
        return write(before, add_generation_prompt=True)
    except InputError:  # many templates refuse a conversation without messages
        return ""


def _start(
    messages: Sequence[Message],
    turn: int,
    full: str,
    mark: str,
    write: Callable[..., str],
    opening: str,
) -> int | None:
    """Where in `full` the model starts to write message `turn`, if not behind `opening`.

    The template writes this turn differently when it is history (it drops the reasoning, say), so
    the place of a plain answer is all there is to go by.
    """
    thought = {key: mark for key in REASONING if messages[turn].get(key)}
    plain = _plain(messages[turn], mark) | thought
    asked = [i for i in range(turn + 1, len(messages)) if messages[i]["role"] == "user"]
    # Results of tools cannot follow an answer that calls none, so they may have to go as well.
    for behind in (messages[turn + 1 :], messages[asked[0] :] if asked else ()):
        try:
            before, found, _ = write([*messages[:turn], plain, *behind]).partition(mark)
        except InputError:
            continue
        # Whitespace before an answer is the answer's, unless the prompt for it ends so as well.
        cuts = range(len(before), len(before.rstrip()) - 1, -1)
        start = max(cuts, key=lambda cut: len(_common_start(before[:cut][::-1], opening[::-1])))
        if found and full.startswith(before[:start]):
            return start
    return None


def _behind_calls(
    messages: Sequence[Message], turn: int, mark: str, write: Callable[..., str], end_token: str
) -> tuple[str, str]:
    """What the template writes behind the arguments of the calls in message `turn`.

    Returns the part that ends the turn, such as `"}}</tool_call><|im_end|>`, and the rest.
    """
    calls = messages[turn]["tool_calls"]
    marked = [
        {**call, "function": {**call["function"], "arguments": {mark: mark}}} for call in calls
    ]
    up_to_here = [*messages[:turn], {**messages[turn], "tool_calls": marked}]
    text = write([*up_to_here, *messages[turn + 1 :]])
    if text.count(mark) < 2 * len(calls):
        raise InputError(
            f"the chat template does not write the tool calls of message {turn + 1}; use a model "
            "whose template does, or write the calls into 'content'"
        )
    after = text.rpartition(mark)[2]
    # Whether the turn is the last or more follows, its own end is written the same.
    own = _common_start(after, write(up_to_here).rpartition(mark)[2])
    at = own.find(end_token) if end_token else -1
    own = own.rstrip() if at < 0 else own[: at + len(end_token)]
    return own, after[len(own) :]


def _common_start(a: str, b: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return "".join(character for character, _ in same)


def _unshown(messages: Sequence[Message], full: str, spans: Mapping[int, Span]) -> tuple[str, ...]:
    """The roles of messages of which something is missing in the text, each once."""
    roles = []
    for turn, message in enumerate(messages):
        where, parts = full, [message.get("content")]
        if turn in spans:
            start, end = spans[turn]
            where = full[start:end]
            parts += [message.get(key) for key in REASONING]
            parts += [call["function"]["name"] for call in message.get("tool_calls") or ()]
        if not all(_shows(where, part) for part in parts if isinstance(part, str)):
            roles.append(message["role"])
    return tuple(dict.fromkeys(roles))


def _shows(text: str, part: str) -> bool:
    """Whether `text` has `part`, perhaps with other whitespace, or escaped as JSON is."""
    part = part.strip()
    if part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
        return True
    return "".join(part.split()) in "".join(text.split())


def _ignores_tools(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", full: str
) -> bool:
    try:
        return render(messages, tokenizer) == full
    except InputError:
        return False
