"""What a chat template writes between an answer and the next one, as tokens to append.

A conversation that a model writes turn by turn is only ever appended to: the tokens that it has
sampled stay as they are, and behind them come those of the messages that answer it. They are taken
from a short conversation in which a stand-in has the place of the answer, so that nothing that a
template does to earlier turns (leaving out their reasoning, say) can change what was sampled.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorakit.data.boundaries import encode_apart, encode_texts
from lorakit.data.conversations import Message
from lorakit.data.spans import REASONING, find_answers
from lorakit.data.templates import render
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASKED: Message = {"role": "user", "content": "a"}
_MARK = "5283917406"


def next_turn(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[dict[str, Any]] = (),
    last: int | None = None,
    strict: bool = False,
) -> list[int]:
    """The tokens of `messages` behind an answer, up to where the next answer begins.

    Args:
        messages: what answers it: the results of the functions that it calls (role `tool`, with
            their `name`, and `tool_call_id` where the call had one), or messages of other roles.
        last: the answer's last token. Where it is not the one that ends an answer in front of
            such messages (GLM has another one before a tool's result), that one is added first.
        strict: the contents of the messages must stand there to the letter.

    Raises:
        InputError: the chat template refuses such messages, does not write one of them (with
            `strict`), or has no clear place where an answer ends.
    """
    asked = [_ASKED, _stand_in(messages), *messages]
    try:
        text = render(asked, tokenizer, add_generation_prompt=True, tools=tools)
    except InputError:
        if len(messages) == 1:
            raise
        asked[1] = _stand_in(messages[:1])  # some take one call a message, and several results
        text = render(asked, tokenizer, add_generation_prompt=True, tools=tools)
    whole = [*asked, {"role": "assistant", "content": _MARK}]
    found = find_answers(whole, tokenizer, tools, {len(whole) - 1})
    end = found.spans[0][1]
    if text[:end] != found.text[:end]:
        raise InputError(
            "the chat template writes an answer otherwise when another one follows, so a "
            "conversation cannot go on behind it: use another template"
        )
    missing = [role for role in found.unshown if role in {m["role"] for m in messages}]
    if missing and strict:
        raise InputError(
            f"the chat template does not write the content of a message of the role {missing[0]}"
        )
    [encoded] = encode_texts([text], tokenizer)
    at = bisect_left(encoded.starts, end)
    closing = encoded.ids[at - 1]
    if closing in tokenizer.added_tokens_decoder:  # it may swallow whitespace behind it
        first = [] if last in (None, closing) else [closing]
        return [*first, *encoded.ids[at:]]
    [encoded] = encode_apart([text], [[end]], tokenizer)
    return encoded.ids[bisect_left(encoded.starts, end) :]


def _stand_in(messages: Sequence[Message]) -> Message:
    calls = [
        {
            "type": "function",
            "id": message.get("tool_call_id") or f"call{number:05d}",
            "function": {"name": message.get("name") or "f", "arguments": {"a": "b"}},
        }
        for number, message in enumerate(messages, 1)
        if message["role"] == "tool"
    ]
    return {"role": "assistant", "content": "" if calls else "b"} | (
        {"tool_calls": calls} if calls else {}
    )


def drops_reasoning(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template leaves the reasoning of an answer out when another turn follows."""
    thinking = {"role": "assistant", "content": "b"} | dict.fromkeys(REASONING, _MARK)
    try:
        alone = render([_ASKED, thinking], tokenizer)
        followed = render([_ASKED, thinking, _ASKED], tokenizer, add_generation_prompt=True)
    except InputError:
        return False
    return _MARK in alone and _MARK not in followed
