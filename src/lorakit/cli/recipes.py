"""What every verb that takes a recipe has in common: its arguments, and the recipe they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.errors import InputError

if TYPE_CHECKING:
    from lorakit.training.recipe import Recipe

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE.yaml] [KEY=VALUE]...",
        help="A recipe, and values that override it (lora.r=16).",
    ),
]
Model = Annotated[
    str | None, typer.Option(help="The base model: alias, folder, .gguf file, or hub id.")
]
Data = Annotated[str | None, typer.Option(help="The training data: a file, a folder, or a hub id.")]

_WITH_RECIPES = ("train", "check", "sweep")


def recipe_from(
    arguments: list[str] | None,
    options: dict[str, str | None],
    defaults: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe that a command line gives.

    Args:
        arguments: a recipe's path, and overrides.
        options: values by dotted key; those that are None were not given.
        defaults: values by key at the top, for what neither recipe nor command line says.

    Raises:
        InputError: it is no valid recipe.
    """
    recipe, overrides = split_arguments(arguments or [])
    overrides += [(key, value) for key, value in options.items() if value is not None]
    from lorakit.training.recipe import load_recipe

    return load_recipe(recipe, overrides, defaults or {})


def split_arguments(arguments: list[str]) -> tuple[Path | None, list[str | tuple[str, str]]]:
    """The recipe's path, if one is given, and the overrides."""
    paths = [a for a in arguments if "=" not in a or _is_file(a)]
    if len(paths) > 1:
        raise InputError(
            f"give one recipe, not {len(paths)} ({', '.join(paths)}); values are KEY=VALUE"
        )
    return (Path(paths[0]) if paths else None), [a for a in arguments if a not in paths]


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # an override may be longer than any file's name
        return False


def option_hint(error: Any) -> str | None:
    """What to say of an option that a verb with a recipe lacks, if it is a key of a recipe or
    another tool's name of one.

    Args:
        error: click's error of usage.
    """
    name, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if name is None or context is None or context.command.name not in _WITH_RECIPES:
        return None
    from lorakit.training.recipe import key_hint

    if hint := key_hint(name, ()):
        return f"No such option: {name}{hint}; recipe keys are given as KEY=VALUE"
    return None
