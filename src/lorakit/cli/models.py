"""`lorakit models`: which base models there are, and what one of them is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.console import say, say_json

if TYPE_CHECKING:
    from lorakit.models.describe import KnownModel, ModelFacts


def models(
    name: Annotated[
        str | None, typer.Argument(help="An alias, a folder, a .gguf file, or a hub id.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """List the base models on this machine, or describe one.

    No weights are loaded.
    """
    if name is None:
        from lorakit.models.describe import known_models

        found = known_models()
        if as_json:
            say_json([one.to_dict() for one in found])
        else:
            _list(found)
        return
    from lorakit.models.describe import describe

    facts = describe(name)
    if as_json:
        say_json(facts.to_dict())
    else:
        _show(facts)


def _list(found: list[KnownModel]) -> None:
    from lorakit.cli.tables import print_table

    rows = [
        (one.name, one.family or "-", _size(one.bytes) if one.bytes else "-", one.state)
        for one in found
    ]
    print_table("", ("model", "family", "size", "here"), rows)


def _show(facts: ModelFacts) -> None:
    from lorakit.models.describe import RANK

    stored = facts.dtype or "files that are not here"
    if facts.quantization:
        stored = f"{stored}, quantised ({facts.quantization})"
    lines = {
        "family": f"{facts.family} ({facts.architecture})",
        "parameters": f"{facts.parameters:,} in {stored}, {_size(facts.bytes)}",
        "context": "no limit" if facts.context is None else f"{facts.context:,} positions",
        "vocabulary": "none" if facts.vocabulary is None else f"{facts.vocabulary:,} tokens",
        "template": "its own" if facts.template else "none",
        "tasks": ", ".join(facts.tasks) or "none that lorakit train knows",
        "lies in": facts.path,
    }
    for label, value in lines.items():
        say(f"{label + ':':<12} {value}")
    for preset, means in facts.presets.items():
        targets = means.target_modules
        shown = targets if isinstance(targets, str) else ", ".join(targets)
        say(
            f"{preset}: {shown} ({means.modules} modules, "
            f"{means.parameters:,} parameters at r={RANK})"
        )
    for notice in facts.notices:
        say(f"notice: {notice}")


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e3:,.0f} kB"
