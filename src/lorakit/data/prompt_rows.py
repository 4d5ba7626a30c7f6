"""Rows of a prompt alone, whose answer is still to be sampled."""

from lorakit.data.conversations import Message, conversation, history, string, tools
from lorakit.data.picture_columns import with_pictures
from lorakit.data.samples import RowFormat, Sample, system_message
from lorakit.data.sources import Row


def asked_messages(row: Row) -> list[Message]:
    """The conversation that a row's `prompt` ends, with its `system` and `history`."""
    if isinstance(row.values["prompt"], list):
        asked = conversation(row, "prompt")
    else:
        asked = [
            {"role": "user", "content": string(row, row.values["prompt"], "'prompt'", empty=False)}
        ]
    return with_pictures(row, [*system_message(row), *history(row), *asked])


def _read(row: Row) -> Sample:
    messages = asked_messages(row)
    return Sample((*messages, {"role": "assistant", "content": ""}), None, row.where, tools(row))


PROMPT = RowFormat(("prompt",), _read, ("system", "history", "tools"), "prompt")
