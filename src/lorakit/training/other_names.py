"""What settings of other tools are called here; one line a name in `other_names.toml`.

A name is found wherever it is given. The table is printed into docs/other-names.md by
`python -m lorakit.training.other_names`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files

OTHER_NAMES: Mapping[str, str] = tomllib.loads(
    (files(__package__) / "other_names.toml").read_text(encoding="utf-8")
)
"""By the name in lower case and with underscores: what to give instead."""


def instead(name: str) -> str | None:
    """What to give instead of another tool's `name`; None where it is none.

    Args:
        name: as it was given: `cutoff_len`, `--cutoff-len`.
    """
    hint = OTHER_NAMES.get(plain(name))
    if hint is None:
        return None
    return f"leave it out: {hint[3:]}" if hint.startswith("-: ") else f"use {hint}"


def plain(name: str) -> str:
    """A name as the table has it: lower case, underscores, no leading dashes."""
    return name.strip().lstrip("-").lower().replace("-", "_")


_HEAD = """\
# Names of other tools

Keys of LLaMA-Factory, Axolotl, Unsloth, TRL, ms-swift, mlx-lm and older transformers, and what
they are called in a recipe. Given to lorakit, in a recipe, as `KEY=VALUE` or as `--key`, each is
refused with this line. Fields of `LoraConfig` and `TrainingArguments` keep their names, under
`lora` and `training`.

The table is made of `lorakit/training/other_names.toml` by
`python -m lorakit.training.other_names`.

| there | here |
| --- | --- |
"""


def table() -> str:
    """docs/other-names.md."""
    lines = []
    for name, hint in sorted(OTHER_NAMES.items()):
        key, space, note = hint.partition(" (")
        here = f"{hint[3:]}" if hint.startswith("-: ") else f"`{key}`{space}{note}"
        lines.append(f"| `{name}` | {here} |")
    return _HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
