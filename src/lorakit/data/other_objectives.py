"""Rows that are made for other objectives than learning one answer, recognised by their columns.

Preference pairs, single judgements (KTO), steps with labels, message trees and sounds would all
fit a format by half, and the wrong text would be learned. They are refused with what they are.
"""

import re
from collections.abc import Collection, Mapping

from lorakit.data.column_hints import as_yaml, named_for
from lorakit.data.picture_columns import COLUMNS
from lorakit.data.sources import Row
from lorakit.data.text_files import is_text_file
from lorakit.errors import listed

_PAIR = re.compile(
    r"(.*_)?(chosen|rejected)(_.*)?|(non_)?preferred_output|better_response_id|response_[01]"
)
_CONVERSATION = (
    *({"messages"}, {"conversations"}, {"prompt", "completion"}, {"prompt", "response"}),
    *({"instruction", "output"}, {"question", "answer"}, {"query", "response"}),
)
_ANSWERS = frozenset({"completion", "response", "output", "answer"})
_JUDGEMENTS = ("label", "kto_tag")
_MEDIA = ("video", "videos", "audio", "audios")
_READ_PICTURES = {"conversation", "preference", "unpaired_preference"}


def refuse_other_objectives(
    row: Row, columns: Mapping[str, str], kinds: Collection[str] = ()
) -> None:
    """Raises InputError for a row that no answer can be learned from as it is.

    Args:
        columns: the recipe's `data.columns`. Whoever names a column of a pair there, or the one
            with the answer, has chosen what is learned of it.
        kinds: the kinds of rows that the objective takes, as in `RowFormat.kind`.
    """
    if is_text_file(row) and "document" not in kinds:
        raise row.error(
            "is plain text: learn from it with objective: pretrain, or write rows into a .jsonl "
            "file"
        )
    given = {name: value for name, value in row.values.items() if not _is_empty(value)}
    own = set(columns.values())
    pair = [name for name in given if _PAIR.fullmatch(name.strip().lower())]
    if {"instruction", "output"} <= given.keys() and _is_pair(given["output"]):
        pair.append("output")  # LLaMA-Factory's older form: the better answer first
    chosen = own & set(pair) or not _ANSWERS.isdisjoint(columns)
    if pair and "preference" not in kinds and not chosen:
        raise row.error(
            f"is a preference pair ({listed(pair, 4)}): learn from it with objective: "
            "dpo (or simpo, orpo, kto); to learn the chosen answers alone, write rows of a prompt "
            f"and that answer{_example(given)}"
        )
    for name in _JUDGEMENTS if "unpaired_preference" not in kinds else ():
        names = given.keys() | columns.keys()
        if name in own or not any(columns_of <= names for columns_of in _CONVERSATION):
            continue
        if _is_judgement(given.get(name)):
            raise row.error(
                f"'{name}' says whether the answer is desirable: learn from it with "
                "objective: kto (KTO); to learn the desirable answers alone, keep their rows and "
                f"remove '{name}'"
            )
    stepwise = {"prompt", "completions", "labels"} <= given.keys() and not own
    if stepwise and "stepwise_supervision" not in kinds:
        raise row.error(
            "has a label for each step of an answer, for a reward model of "
            "processes, which lorakit does not have: write rows of prompt and completion"
        )
    if {"message_id", "parent_id", "text"} <= row.values.keys() and not own:
        raise row.error(
            "is one message of a tree (message_id, parent_id, as OpenAssistant has "
            "them): write each path from a root to an answer as one row with 'messages'"
        )
    reads_pictures = not _READ_PICTURES.isdisjoint(kinds)
    for name in _MEDIA if reads_pictures else (*_MEDIA, *COLUMNS):
        if name in given and name not in own:
            raise row.error(
                f"has '{name}', which this objective does not learn from: "
                "drop the row, or remove the column if the text makes sense without"
            )


def _example(given: Mapping[str, object]) -> str:
    """The `data.columns` by which the better answers alone are learned, where that is clear."""
    strings = [name for name, value in given.items() if isinstance(value, str)]
    answers = named_for(strings, "better") or named_for(strings, "answer")
    questions, contexts = named_for(strings, "question"), named_for(strings, "context")
    if len(answers) != 1 or len(questions) != 1 or len(contexts) > 1:
        return ""
    columns = {"prompt": questions[0], "completion": answers[0]}
    if contexts:
        columns = {"instruction": questions[0], "input": contexts[0], "output": answers[0]}
    return f", or data.columns: {as_yaml(columns)}"


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, (str, list, dict)) and not value)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)


def _is_judgement(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false")
    return isinstance(value, (bool, int)) and value in (0, 1)
