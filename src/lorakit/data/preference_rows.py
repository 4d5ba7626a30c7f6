"""Rows of preference pairs: a prompt with a chosen and a rejected answer.

The forms are those of TRL (with an explicit prompt, or with whole conversations whose common
beginning is the prompt), LLaMA-Factory, ms-swift, OpenAI and hh-rlhf. A string as prompt is a user
message and a string as answer an assistant message, as in the forms of supervised fine-tuning.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite

from lorakit.data.column_hints import beside, named_for
from lorakit.data.conversations import (
    Message,
    check_conversation,
    conversation,
    history,
    kind_of_value,
    pictures_of,
    string,
    text_of,
    tools,
)
from lorakit.data.picture_columns import COLUMNS, with_pictures
from lorakit.data.samples import RowFormat, Sample, system_message, take_marks
from lorakit.data.sources import Row

_TALKS = ("messages", "conversations")
_QUESTIONS = ("prompt", "question", "instruction")
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']""")
_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class PairSample(Sample):
    """A prompt with its chosen answer, as a `Sample`, and beside it the rejected answer.

    Attributes:
        rejected: the same prompt with the rejected answer.
        begin: the messages before this position are the prompt.
        margin: by how much the chosen answer is better, where the row has that (`margin`).
    """

    rejected: Sample = field(kw_only=True)
    begin: int = field(kw_only=True)
    margin: float | None = field(default=None, kw_only=True)

    @property
    def marked(self) -> bool:
        """Whether an answer behind the prompt is marked as not learned."""
        return any(i >= self.begin for part in self.parts for i in part.unlearned)

    @property
    def content_key(self) -> tuple[str, ...]:
        """Of two pairs the same where prompt and both answers are."""
        answers = [sample.messages[self.begin :] for sample in (self, self.rejected)]
        return self.prompt_key, json.dumps(answers, sort_keys=True, ensure_ascii=False)

    @property
    def parts(self) -> tuple[Sample, ...]:
        """Both conversations."""
        return self, self.rejected

    @property
    def pictures(self) -> list[str]:
        """The pictures of all messages: those behind the prompt are read too."""
        return [p for message in self.messages for p in pictures_of(message["content"])]

    @property
    def _last_answer(self) -> int:
        return self.begin


def pair_of(
    row: Row, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
) -> PairSample:
    """The sample of a prompt and what follows it in the chosen and in the rejected conversation.

    Only what the assistant says behind the prompt is learned from.

    Raises:
        InputError: an answer is empty or does not end with the assistant, or both are the same.
    """
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(row, name, answer)
    if not any(message["role"] in ("user", "tool") for message in prompt):
        raise row.error(
            "nothing comes before the answers; give a 'prompt', or begin 'chosen' "
            "and 'rejected' with the same user message"
        )
    if prompt[-1]["role"] == "assistant":
        raise row.error(
            "the prompt ends with an assistant message, and the answers would follow "
            "it; end it with a user message"
        )
    functions = tools(row)
    made: list[Sample] = []
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        shown = with_pictures(row, [*system_message(row), *prompt, *answer])
        messages, unlearned = take_marks(row, shown)
        check_conversation(row, messages)
        begin = len(messages) - len(answer)
        earlier = {i for i in range(begin) if messages[i]["role"] == "assistant"}
        sample = Sample(tuple(messages), None, row.where, functions, unlearned=unlearned | earlier)
        if not sample.learned:
            raise row.error(f"every answer in '{name}' is marked as not learned; drop the row")
        made.append(sample)
    first, second = made
    if first.messages == second.messages:
        raise row.error(
            "the chosen and the rejected answer are identical, so there is no "
            "preference to learn; drop the row"
        )
    return PairSample(
        first.messages,
        None,
        row.where,
        functions,
        unlearned=first.unlearned,
        rejected=second,
        begin=len(first.messages) - len(chosen),
        margin=_margin(row),
    )


def _margin(row: Row) -> float | None:
    """The number in the optional column `margin`."""
    value = row.values.get("margin")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise row.error(f"'margin' is {value!r:.40}, expected a number, or leave it out")
    return float(value)


def _check_answer(row: Row, name: str, answer: Sequence[Message]) -> None:
    if not answer:
        raise row.error(f"'{name}' has no answer after what both conversations have in common")
    if answer[0]["role"] != "assistant":
        raise row.error(
            f"the prompts differ: after what 'chosen' and 'rejected' have in common "
            f"comes a {answer[0]['role']} message in '{name}'; both answers need the same prompt"
        )
    if answer[-1]["role"] != "assistant":
        raise row.error(
            f"the last turn of '{name}' is a {answer[-1]['role']} message; it must be "
            "the assistant's"
        )
    for message in answer:
        if message["role"] == "assistant" and not (
            text_of(message["content"]).strip() or message.get("tool_calls")
        ):
            raise row.error(f"an answer in '{name}' is empty; fill it or drop the row")


def _messages(row: Row, value: object, column: str) -> list[Message]:
    """Messages with `role` and `content` or `from` and `value`: a list of them, or one."""
    items = [value] if isinstance(value, dict) else value
    first = items[0] if isinstance(items, list) and items else None
    by_role = isinstance(first, dict) and "from" not in first
    keys = ("role", "content") if by_role else ("from", "value")
    return conversation(replace(row, values={column: items}), column, keys, named_roles=True)


def _answer(row: Row, column: str) -> list[Message]:
    """What a column holds as answer: a string, a message, or messages."""
    value = row.values[column]
    if isinstance(value, str):
        text = string(row, value, f"'{column}'", empty=False)
        if _MESSAGES_AS_TEXT.match(text):
            raise row.error(
                f"'{column}' holds messages written as text, as an export to CSV "
                "leaves them; write a list of messages"
            )
        return [{"role": "assistant", "content": text}]
    if isinstance(value, list) and any(isinstance(one, str) for one in value):
        raise row.error(
            f"'{column}' is a list of strings, expected one answer: write a row for each pair"
        )
    if not isinstance(value, (dict, list)) or not value:
        found = kind_of_value(value) if value is None or value else "empty"
        raise row.error(
            f"'{column}' is {found}, expected a string, a message {{role, content}} "
            "or a list of messages"
        )
    return _messages(row, value, column)


def _common(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many messages both conversations begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


# --- chosen and rejected --------------------------------------------------------------------------


def _read(row: Row) -> PairSample:
    given = _given(row)
    chosen, rejected = row.values["chosen"], row.values["rejected"]
    if not given and isinstance(chosen, str) and isinstance(rejected, str):
        first, second = (_hh_turns(row, name) for name in ("chosen", "rejected"))
    else:
        first, second = (_answer(row, name) for name in ("chosen", "rejected"))
    whole = [turns[0]["role"] != "assistant" for turns in (first, second)]
    if whole[0] != whole[1]:
        long, short = ("chosen", "rejected") if whole[0] else ("rejected", "chosen")
        raise row.error(
            f"'{long}' is a whole conversation and '{short}' an answer; write both in the same way"
        )
    if not whole[0]:
        if len(given) > 1:
            raise row.error(
                f"both {' and '.join(map(repr, given))} would come before the "
                "answers; remove all but one"
            )
        prompt = next(iter(given.values()), [])
        return pair_of(row, prompt, first, second)
    begin = _common(first, second)
    for name, turns in given.items():
        if not _agrees(name, turns, first, begin):
            raise row.error(
                f"'{name}' differs from how 'chosen' and 'rejected' begin, which are "
                f"whole conversations: remove '{name}' or correct it"
            )
    return pair_of(row, first[:begin], first[begin:], second[begin:])


def _agrees(name: str, turns: Sequence[Message], chosen: Sequence[Message], begin: int) -> bool:
    """Whether a further column says what whole conversations begin with."""
    if name in _QUESTIONS and len(turns) == 1:
        asked = text_of(turns[0]["content"]).strip()
        return any(asked == text_of(message["content"]).strip() for message in chosen[:begin])
    return list(turns) in (list(chosen), list(chosen[: len(turns)])) and (
        len(turns) <= begin or len(turns) == len(chosen)
    )


def _given(row: Row) -> dict[str, list[Message]]:
    """The messages in each of the columns that may hold the prompt, of those that are filled."""
    found: dict[str, list[Message]] = {}
    for name in _TALKS:
        if row.values.get(name):
            found[name] = _messages(row, row.values[name], name)
    if (value := row.values.get("prompt")) is not None:
        if isinstance(value, list):
            found["prompt"] = [*history(row), *_messages(row, value, "prompt")] if value else []
        elif isinstance(value, str) and _is_hh(value):
            found["prompt"] = _hh_prompt(row, value)
        else:
            found["prompt"] = [*history(row), _question(row, "prompt")]
    for name in ("question", "instruction"):
        if row.values.get(name) is not None:
            found[name] = [*history(row), _question(row, name)]
    return {name: turns for name, turns in found.items() if turns}


def _question(row: Row, column: str) -> Message:
    """A question, with what it is about (`input`) behind it."""
    text = string(row, row.values[column], f"'{column}'")
    context = row.values.get("input")
    if column == "instruction" and context is not None:
        context = string(row, context, "'input'")
        text = "\n".join(filter(None, (text, context)))
    if not text.strip():
        raise row.error(f"'{column}' is empty; fill it or drop the row")
    return {"role": "user", "content": text}


def _is_hh(text: str) -> bool:
    return _TURN.match("\n\n" + text.lstrip()) is not None


def _hh_turns(row: Row, column: str) -> list[Message]:
    """The turns of hh-rlhf's `\\n\\nHuman: … \\n\\nAssistant: …`."""
    text = string(row, row.values[column], f"'{column}'", empty=False)
    if not _is_hh(text):
        raise row.error(
            f"'{column}' is an answer and there is no prompt to it: add the column "
            "'prompt', or name yours in the recipe, as data.columns: {prompt: YOUR_QUESTIONS, "
            "chosen: chosen, rejected: rejected}"
        )
    _, *parts = _TURN.split("\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[name], "content": said.strip()}
        for name, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _hh_prompt(row: Row, text: str) -> list[Message]:
    """A prompt in that form, which ends by asking for the answer."""
    turns = _hh_turns(replace(row, values={"prompt": text}), "prompt")
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return turns


def _proposed(values: Mapping[str, object]) -> dict[str, str] | None:
    """Columns whose names say that they hold the better and the worse answer."""
    better = named_for(values, "better") or named_for(values, "answer")
    worse = named_for(values, "worse")
    if len(better) != 1 or len(worse) != 1:
        return None
    asked = named_for(values, "question")
    prompt = {"prompt": asked[0]} if len(asked) == 1 else {}
    return {**prompt, "chosen": better[0], "rejected": worse[0], **beside(values, ("system",))}


# --- other forms ----------------------------------------------------------------------------------


def _read_two_outputs(row: Row) -> PairSample:
    outputs = row.values["output"]
    if not (isinstance(outputs, list) and len(outputs) == 2):
        raise row.error(
            f"'output' is {kind_of_value(outputs)}, expected a list of two answers, "
            "the better one first; or give the columns 'chosen' and 'rejected'"
        )
    answers = dict(zip(("chosen", "rejected"), outputs, strict=True))
    return _read(replace(row, values={**row.values, **answers}))


def _read_swift(row: Row) -> PairSample:
    talk = _messages(row, row.values["messages"], "messages")
    rejected = row.values["rejected_response"]
    if isinstance(rejected, str):
        begin = len(talk) - 1
    else:  # everything behind the last message of the user
        begin = max((i + 1 for i, m in enumerate(talk) if m["role"] == "user"), default=0)
    return pair_of(row, talk[:begin], talk[begin:], _answer(row, "rejected_response"))


def _read_two_talks(row: Row) -> PairSample:
    first, second = (_messages(row, row.values[c], c) for c in ("messages", "rejected_messages"))
    begin = _common(first, second)
    return pair_of(row, first[:begin], first[begin:], second[begin:])


def _read_openai(row: Row) -> PairSample:
    given = row.values["input"]
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise row.error("'input' must be an object with 'messages'")
    prompt = _messages(row, given["messages"], "input.messages")
    answers = [_answer(row, name) for name in ("preferred_output", "non_preferred_output")]
    return pair_of(replace(row, values={"tools": given.get("tools")}), prompt, *answers)


_BESIDE_TALKS = ("system", "tools", "margin", *COLUMNS)
_BESIDE = (*_BESIDE_TALKS, "history")

PAIR_FORMATS = [
    RowFormat(
        ("chosen", "rejected"),
        _read,
        (*_QUESTIONS, *_TALKS, "input", *_BESIDE),
        "preference",
        _proposed,
    ),
    RowFormat(("instruction", "output"), _read_two_outputs, ("input", *_BESIDE), "preference"),
    RowFormat(("messages", "rejected_response"), _read_swift, _BESIDE_TALKS, "preference"),
    RowFormat(("messages", "rejected_messages"), _read_two_talks, _BESIDE_TALKS, "preference"),
    RowFormat(
        ("input", "preferred_output", "non_preferred_output"), _read_openai, (), "preference"
    ),
]
"""The forms of pairs."""
