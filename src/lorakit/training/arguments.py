"""What lorakit does with every field of `TrainingArguments`; the one table is `arguments.toml`.

A field is honoured, reserved (lorakit sets it) or refused (it would have no effect here). The
table is printed into docs/training-arguments.md by `python -m lorakit.training.arguments`, and a
field of a newer transformers that it lacks is refused until it is placed.
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


def _read() -> dict[str, Argument]:
    text = (files(__package__) / "arguments.toml").read_text(encoding="utf-8")
    return {
        name: Argument(treatment, note[0] if note else "", tuple(note[1:]))
        for name, (treatment, *note) in tomllib.loads(text).items()
    }


ARGUMENTS: Mapping[str, Argument] = _read()
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
    if argument.treatment == "honoured" or _says_what_happens(argument, value):
        return None
    if argument.treatment == "reserved":
        return f"training.{name} is not set here: use {argument.note}"
    return f"training.{name} has no effect here: {argument.note}"


def _says_what_happens(argument: Argument, value: Any) -> bool:
    return value is None or any(
        type(value) is type(inert) and value == inert for inert in argument.inert
    )


_HEAD = """\
# Training arguments

Under `training` a recipe has the fields of transformers' `TrainingArguments`, by their own names.
Each is *honoured*, *reserved* (lorakit sets it: giving another value is refused and names what to
use) or *refused* (it would have no effect here). A field that has no effect beside the other
settings of a recipe is refused or noticed too. `loraplus_lr_ratio` is lorakit's own: with it `B`
learns so many times faster than `A` (LoRA+).

The table is made of `lorakit/training/arguments.toml` by `python -m lorakit.training.arguments`.

| argument | here | note |
| --- | --- | --- |
"""


def table() -> str:
    """docs/training-arguments.md."""
    lines = [
        f"| `{name}` | {argument.treatment} | {argument.note} |"
        for name, argument in sorted(ARGUMENTS.items())
    ]
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    from lorakit.console import write

    write(table())
