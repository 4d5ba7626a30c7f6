"""Rows of a prompt alone, whose answer is still to be sampled."""

from lorakit.data.conversations import conversation, history, string, tools
from lorakit.data.samples import RowFormat, Sample, system_message
from lorakit.data.sources import Row


def _read(row: Row) -> Sample:
    if isinstance(row.values["prompt"], list):
        asked = conversation(row, "prompt")
    else:
        asked = [
            {"role": "user", "content": string(row, row.values["prompt"], "'prompt'", empty=False)}
        ]
    messages = [*system_message(row), *history(row), *asked]
    return Sample((*messages, {"role": "assistant", "content": ""}), None, row.where, tools(row))


PROMPT = RowFormat(("prompt",), _read, ("system", "history", "tools"), "prompt")
