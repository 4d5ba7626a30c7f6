"""What lorakit does with every field of `TrainingArguments`; the one table is `arguments.toml`.

A field is honoured, reserved (lorakit sets it) or refused (it would have no effect here); one of a
newer transformers is refused until it is in the table. `docs/tables.py` prints it into
docs/training-arguments.md.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

Treatment = Literal["honoured", "reserved", "refused"]


@dataclass(frozen=True)
class Argument:
    """How a field of `TrainingArguments` is treated.

    Attributes:
        note: honoured: what should be known here beside transformers' own description; reserved:
            what to use instead; refused: why it has no effect, or what does its work here.
        inert: values of a reserved or refused field that say what happens anyway; they are
            accepted, so that a configuration of another script can be taken over.
    """

    treatment: Treatment
    note: str = ""
    inert: tuple[Any, ...] = ()


_TABLE = tomllib.loads((files(__package__) / "arguments.toml").read_text(encoding="utf-8"))

ARGUMENTS: Mapping[str, Argument] = {
    name: Argument(treatment, note[0] if note else "", tuple(note[1:]))
    for name, (treatment, *note) in _TABLE.items()
}
"""Every field of `TrainingArguments` by name, those of transformers 5.23 and before."""


def refusal(name: str, value: Any) -> str | None:
    """Why `training.<name>` cannot be given this value; None where the field is not the reason.

    Args:
        name: a field of `TrainingArguments`, of this transformers or another.
    """
    argument = ARGUMENTS.get(name)
    if argument is None:
        return (
            f"training.{name} is newer than this lorakit, which does not know what it would do: "
            "leave it out"
        )
    says_what_happens = value is None or any(
        type(value) is type(inert) and value == inert for inert in argument.inert
    )
    if argument.treatment == "honoured" or says_what_happens:
        return None
    if argument.treatment == "reserved":
        return f"training.{name} is not set here: use {argument.note}"
    return f"training.{name} has no effect here: {argument.note}"
