"""What adapters are called by those who ask for them.

Letters and digits of every script can be used. Names are compared in their composed form (NFC), as
file systems and keyboards write one letter in several ways.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path

from lorakit.commands import quoted
from lorakit.errors import InputError
from lorakit.folder_name import folder_name

_LENGTH = 200
_SIGNS = "._:@/+=-"
_FILLERS = "\u115f\u1160\u3164\uffa0"  # letters that show nothing


def named_adapters(arguments: list[str]) -> dict[str, Path]:
    """Adapters by name, of arguments such as `runs/orders` (named `orders`) and `shop=runs/b`.

    Raises:
        InputError: two have one name, or a name cannot be used.
    """
    adapters: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            name, path = folder_name(argument) if argument else "", argument
        name = composed(name)
        check_name(name)
        if name in adapters:
            raise InputError(
                f"{adapters[name]} and {path} are both named {name}: give one a name, as in "
                f"{quoted(f'{name}-2={path}')}"
            )
        adapters[name] = Path(path)
    return adapters


def composed(name: str) -> str:
    """The form of `name` that is compared: a letter and its accent are one character (NFC)."""
    return unicodedata.normalize("NFC", name)


def check_name(name: str) -> None:
    """Whether an adapter can be asked for by `name`.

    Raises:
        InputError: it cannot.
    """
    # L, N and M: letters, digits and the marks on letters, which many scripts need.
    starts = name[:1] not in _SIGNS and _readable(name[:1], "LN")
    if not starts or len(name) > _LENGTH or not _readable(name, "LNM"):
        raise InputError(
            f"{name[:_LENGTH]!r} cannot name an adapter: names have up to {_LENGTH} letters and "
            f"digits (of any script) and {_SIGNS}, and start with a letter or digit. Give one with "
            "NAME=PATH"
        )


def _readable(text: str, kinds: str) -> bool:
    """Whether all of `text` is of these kinds (Unicode's categories), or signs that names have."""
    return bool(text) and all(
        sign in _SIGNS or (unicodedata.category(sign)[0] in kinds and sign not in _FILLERS)
        for sign in text
    )
