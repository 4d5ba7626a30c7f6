"""Rows of an answer and whether it is desirable, which KTO learns from (`unpaired_preference`).

They are the rows of supervised fine-tuning with `label` (TRL, ms-swift) or `kto_tag`
(LLaMA-Factory) beside them. Of a conversation the last answer is judged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakit.data.conversations import kind_of_value, text_of
from lorakit.data.samples import RowFormat, Sample, refused_weight
from lorakit.data.sources import Row
from lorakit.data.supervised_rows import (
    ALPACA,
    MESSAGES,
    PROMPT_COMPLETION,
    PROMPT_RESPONSE,
    QUESTION_ANSWER,
    SHAREGPT,
    proposed_pair,
)

LABELS = ("label", "kto_tag")
"""The columns that may say whether an answer is desirable."""

_WORDS = {"true": True, "false": False, "1": True, "0": False}


@dataclass(frozen=True, slots=True)
class JudgedSample(Sample):
    """A prompt and an answer that is desirable or not."""

    desirable: bool = field(kw_only=True)

    @property
    def marked(self) -> bool:
        """False: earlier answers are only read because the last is judged, not by a mark."""
        return False

    @property
    def content_key(self) -> tuple[str, ...]:
        """The same answer, judged in the same way."""
        return self.prompt_key, self.reference, str(self.desirable)


def judgement(value: object) -> bool | None:
    """What `value` says: true or false, 1 or 0, or one of these as text; None for anything else."""
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    return None


def _judged(form: RowFormat, name: str) -> RowFormat:
    def read(row: Row) -> JudgedSample:
        value = row.values[name]
        desirable = judgement(value)
        if desirable is None:
            found = f"{value!r:.40}" if value is not None else "null"
            kind = "" if value is None else f" ({kind_of_value(value)})"
            raise row.error(f"'{name}' is {found}{kind}, expected true (desirable) or false")
        sample = form.sample(row)
        if sample.weights:
            raise row.error(refused_weight(sample.weights[0]))
        last = sample.learned[-1]
        answer = sample.messages[last]
        if last != len(sample.messages) - 1:
            role = sample.messages[-1]["role"]
            found = "marked as not learned" if role == "assistant" else f"a {role} message"
            raise row.error(
                f"the last turn is {found}; it must be the assistant's, as its answer is judged"
            )
        if not (text_of(answer["content"]).strip() or answer.get("tool_calls")):
            raise row.error("the answer is empty; fill it or drop the row")
        earlier = {i for i in sample.learned if i != last}
        return JudgedSample(
            sample.messages,
            None,
            row.where,
            sample.tools,
            unlearned=sample.unlearned | earlier,
            desirable=desirable,
        )

    return RowFormat((*form.required, name), read, form.optional, "unpaired_preference", _proposed)


def _proposed(values: Mapping[str, object]) -> dict[str, str] | None:
    """Columns of a question and an answer, and the one that can be its judgement."""
    pair = proposed_pair(values)
    judged = [name for name, value in values.items() if judgement(value) is not None]
    if pair is None or len(judged) != 1 or judged[0] in pair.values():
        return None
    return {**pair, "label": judged[0]}


JUDGED_FORMATS = [
    *(
        _judged(form, "label")
        for form in (
            PROMPT_COMPLETION,
            MESSAGES,
            SHAREGPT,
            ALPACA,
            PROMPT_RESPONSE,
            QUESTION_ANSWER,
        )
    ),
    *(_judged(form, "kto_tag") for form in (MESSAGES, SHAREGPT, ALPACA)),
]
"""The forms of judged answers."""
