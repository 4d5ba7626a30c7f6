"""What adapters are called by those who ask for them."""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.commands import quoted
from lorakit.errors import InputError
from lorakit.folder_name import folder_name

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+=-]{0,199}")


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
        check_name(name)
        if name in adapters:
            raise InputError(
                f"{adapters[name]} and {path} are both named {name}: give one a name, as in "
                f"{quoted(f'{name}-2={path}')}"
            )
        adapters[name] = Path(path)
    return adapters


def check_name(name: str) -> None:
    """Whether an adapter can be asked for by `name`.

    Raises:
        InputError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name[:200]!r} cannot name an adapter: names have up to 200 letters, digits and "
            "._:@/+=- and start with a letter or digit. Give one with NAME=PATH"
        )
