"""How a chat template writes an answer: what stands before its text, what ends it, its reasoning.

Found by rendering, as `spans.py` finds answers, so that what a model writes can be compared with
what the template taught it to write. Training masks are `masking.py`'s work.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.conversations import Message
from lorakit.data.samples import Sample
from lorakit.data.spans import REASONING, find_answers
from lorakit.data.templates import render, special_tokens
from lorakit.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK, _THOUGHT = "5283917406", "9047261538"  # digits survive upper-casing, trimming and quoting

KNOWN_REASONING: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),  # Qwen 3, DeepSeek-R1, GLM 4.5, SmolLM 3, Phi-4-reasoning
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1, OpenThinker
    # gpt-oss: everything before the final channel.
    ("<|channel|>analysis", "<|channel|>final<|message|>"),
    ("<|channel|>commentary", "<|channel|>final<|message|>"),
)
"""Marks around reasoning at the beginning of an answer, beside those that a template shows."""


@dataclass(frozen=True)
class AnswerForm:
    """What a template writes around the text of an answer.

    Attributes:
        before: between the generation prompt and the text, where there is no reasoning (Qwen 3's
            empty thinking block); mostly nothing.
        end: behind the text, as far as a model learns it; nothing where answers have no end mark.
        end_text: the part of `end` that is ordinary text, which no token ends answers by.
        end_token: the id of the token in `end`; None where there is none.
        asked: the end of the generation prompt.
        opened: what closes the reasoning that the generation prompt has opened; mostly nothing.
        reasoning: marks around reasoning, `(opening, closing)`.
        special: matches the name of any special token.
    """

    before: str
    end: str
    end_text: str
    end_token: int | None
    asked: str
    opened: str
    reasoning: tuple[tuple[str, str], ...]
    special: re.Pattern[str]

    @property
    def plain_before(self) -> str:
        """`before` without special tokens, as decoded answers have it."""
        return self.special.sub("", self.before)

    def shown(self, text: str) -> str:
        """What was written, without the end mark and an empty reasoning block of the template's."""
        return self._ended(text).removeprefix(self.plain_before)

    def split(self, text: str) -> tuple[str, str]:
        """The reasoning at the beginning of `text` with its marks, and the answer behind it.

        Names of special tokens may stand in `text`; they are left out of the answer if there is
        reasoning. An answer that ends inside its reasoning is empty.
        """
        text = self._ended(text)
        rest = text
        if self.opened and self.opened in rest:
            rest = rest.partition(self.opened)[2]
        while (behind := self._behind_block(rest.lstrip())) is not None:
            rest = behind
        if rest == text:
            return "", text
        return text[: len(text) - len(rest)], self.special.sub("", rest).lstrip()

    def _behind_block(self, text: str) -> str | None:
        before = self.before.strip()
        if before and text.startswith(before):
            return text[len(before) :]
        for opening, closing in self.reasoning:
            if text.startswith(opening):
                return text.partition(closing)[2]
        return None

    def _ended(self, text: str) -> str:
        return text.partition(self.end_text)[0] if self.end_text else text


def answer_form(tokenizer: PreTrainedTokenizerBase) -> AnswerForm:
    """The form of answers in the tokenizer's chat template.

    A template that cannot be read that way has the known forms of reasoning, and no end mark.
    """
    special = special_tokens(tokenizer)
    before, end = _around(tokenizer, [_answer(_MARK)])
    if not end:  # GLM: the next message begins with what ends this one
        end = _around(tokenizer, [_answer(_MARK), _question(), _answer("b")])[1]
        end = end if special.search(end) else ""
    thinking = _answer(_MARK) | dict.fromkeys(REASONING, _THOUGHT)
    opening, found, closing = _around(tokenizer, [thinking])[0].partition(_THOUGHT)
    closing = closing.strip() if found else ""
    reasoning = KNOWN_REASONING
    if opening.strip() and closing:
        reasoning = ((opening.strip(), closing), *reasoning)
    asked = _asked(tokenizer)
    opened = next((close for name, close in KNOWN_REASONING if asked.rstrip().endswith(name)), "")
    if closing and not opening.strip():
        opened = closing
    name, token = _end_token(end, tokenizer, special)
    end_text = (end.partition(name)[0] if name else end).strip()
    return AnswerForm(before, end, end_text, token, asked, opened, reasoning, special)


def taught_answer(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, form: AnswerForm
) -> tuple[str, str]:
    """Reasoning and answer of the last learned turn of `sample`, as the template writes them.

    Where the template refuses the conversation it is the row's own text.
    """
    if not sample.learned:
        return "", sample.reference
    turns = sample.messages[: sample.learned[-1] + 1]
    try:
        found = find_answers(turns, tokenizer, sample.tools, sample.unlearned)
    except InputError:
        return form.split(sample.reference)
    start, end = found.spans[-1]
    text = found.text[start:end]
    if form.end and form.end_token is not None:
        text = text.removesuffix(form.end)
    reasoning, answer = form.split(text)
    return reasoning, form.special.sub("", answer)


def _question() -> Message:
    return {"role": "user", "content": "a"}


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _around(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]]) -> tuple[str, str]:
    """What is learned before and behind the mark in the first of `turns`, behind a question."""
    try:
        found = find_answers([_question(), *turns], tokenizer)
    except InputError:
        return "", ""
    start, end = found.spans[0]
    before, shown, behind = found.text[start:end].partition(_MARK)
    return (before, behind) if shown else ("", "")


def _asked(tokenizer: PreTrainedTokenizerBase) -> str:
    """The last line of the generation prompt, and what follows the question in it."""
    try:
        asked = render([_question()], tokenizer, add_generation_prompt=True)
        behind = asked.removeprefix(render([_question()], tokenizer))
    except InputError:
        return ""
    return behind if behind != asked else asked[asked.rstrip().rfind("\n") + 1 :]


def _end_token(
    end: str, tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str]
) -> tuple[str, int | None]:
    """The token that ends an answer: a special one in `end`, or an added one that is all of it."""
    found = special.search(end)
    name = found.group() if found else end.strip()
    number = tokenizer.get_vocab().get(name) if name else None
    if number is None or not (found or number in tokenizer.added_tokens_decoder):
        return "", None
    return name, int(number)
