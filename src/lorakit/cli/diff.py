"""`lorakit diff`: two adapters beside each other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.shared_options import rows_to_compare
from lorakit.cli.tables import print_table, printable
from lorakit.console import open_console, say, say_all, say_json

if TYPE_CHECKING:
    from lorakit.adapters.diff import Diff, ModuleDiff, Summary
    from lorakit.evaluation.compare import ChangedAnswer


def diff(
    first: Annotated[Path, typer.Argument(help="The first adapter's folder.")],
    second: Annotated[Path, typer.Argument(help="The second adapter's folder.")],
    modules: Annotated[
        bool,
        typer.Option("--modules", help="Show every module, not only layers and kinds of module."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(help="Rows that both adapters answer, to show which answers differ."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first rows.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model for --data, if not the recorded one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Compare the updates of two adapters, or their answers.

    Answers are compared with --data.
    """
    from lorakit.adapters.diff import diff as run

    samples = rows_to_compare(data, limit, base)
    found = run(first, second)
    changed: list[ChangedAnswer] = []
    asked = 0
    if data is not None:
        from lorakit.evaluation.compare import changed_answers

        changed, asked = changed_answers(
            first, second, samples, base=base, max_new_tokens=max_new_tokens
        )
    if as_json:
        answers = {"prompts": asked, "changed": [asdict(answer) for answer in changed]}
        values = {**found.to_dict(), **({"answers": answers} if data else {})}
        say_json(values)
        return
    _show(found, modules)
    if data is not None:
        _show_answers(changed, asked)


def _show(found: Diff, every_module: bool) -> None:
    for letter, name, base in zip("AB", found.adapters, found.bases, strict=True):
        say(f"{letter}: {name}, for {base or 'a base that it does not say'}")
    if found.same_weights is False:
        say("they were trained on different weights (by fingerprint)", err=True)
    say_all(found.notices)
    if found.identical:
        say("both make the same updates to the bit")
    for field, (mine, theirs) in found.settings.items():
        say(f"{field}: {_short(mine)} in A, {_short(theirs)} in B")
    for letter, only in zip("AB", found.only, strict=True):
        if only:
            say(f"only in {letter}: {len(only)} modules, such as {only[0]}")
    for letter, parts in zip("AB", found.skipped, strict=True):
        for part in parts:
            say(f"not compared, in {letter}: {part.path}: {part.reason}")
    tables = [("kind", found.by_kind()), ("layer", found.by_layer())]
    for heading, summaries in tables:
        rows = [_row(s.name, s, s.chance) for s in summaries]
        if heading == "kind":
            rows.append(_row("all", found.overall(), found.overall().chance))
        print_table("", (heading, *_HEADINGS), rows)
    if every_module:
        rows = [_row(m.path, m, sum(m.chance) / 2) for m in found.modules]
        print_table("", ("module", *_HEADINGS), rows)
    say("overlaps are of the directions with 90% of ‖ΔW‖²; by chance: of random ones")


_HEADINGS = ("‖ΔW‖ A", "‖ΔW‖ B", "cosine", "outputs", "inputs", "chance")


def _row(name: str, s: Summary | ModuleDiff, chance: float) -> tuple[str, ...]:
    overlaps = f"{s.output_overlap:.2f}", f"{s.input_overlap:.2f}", f"{chance:.2f}"
    return name, f"{s.norms[0]:.3g}", f"{s.norms[1]:.3g}", f"{s.cosine:+.3f}", *overlaps


def _show_answers(changed: list[ChangedAnswer], asked: int) -> None:
    from rich.table import Table

    say(f"{len(changed)} of {asked} answers differ")
    if not changed:
        return
    table = Table(show_lines=True)
    for heading in ("prompt", "A", "B", "row's answer"):
        table.add_column(heading, overflow="fold")
    for answer in changed:
        last = answer.prompt[-1].get("content") if answer.prompt else ""
        texts = (str(last), answer.first, answer.second, answer.reference)
        table.add_row(*(printable(text) for text in texts))
    open_console().print(table)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]} …"
