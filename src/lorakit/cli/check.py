"""`lorakit check`: what a recipe would do, before it is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.recipes import Arguments, Data, Model, recipe_from
from lorakit.cli.tables import print_table, printable
from lorakit.console import open_console

if TYPE_CHECKING:
    from rich.console import Console

    from lorakit.data.checks import RowStatistics
    from lorakit.data.picture_figures import PictureFigures
    from lorakit.lora.status import ModuleKind
    from lorakit.training.check import ShownPiece

# Two shades in turn show where a token ends.
_SHADES = {
    "learned": ("black on green", "black on bright_green"),
    "read": ("", "on bright_black"),
    "cut": ("strike red", "strike bright_red"),
}
_MARKS = {"learned": "⟦⟧", "read": ("", ""), "cut": "✂✂"}
_BAR = 40  # characters


def check(
    arguments: Arguments = None,
    model: Model = None,
    data: Data = None,
    show: Annotated[int, typer.Option(min=0, help="How many rows to show as tokens.")] = 1,
    forecast: Annotated[
        bool, typer.Option(help="Measure time and memory on a few training batches.")
    ] = True,
    contact_sheet: Annotated[
        Path | None,
        typer.Option(help="Draw the first pictures beside their questions and answers: an .html."),
    ] = None,
    contact_sheet_rows: Annotated[
        int, typer.Option(min=1, help="How many rows the contact sheet shows.")
    ] = 60,
) -> None:
    """Show a recipe's rows, trainable parameters, time and memory.

    Nothing is written but the contact sheet.
    """
    options = {"model": model, "data.train": data}
    recipe = recipe_from(arguments, options, {"output_dir": "not-written"})

    from lorakit.errors import InputError, count, one_line
    from lorakit.report.contact_sheet import require_sheet_place, write_contact_sheet
    from lorakit.training.check import check as run
    from lorakit.training.check import shown_row
    from lorakit.training.processes import process_count

    if process_count() > 1:
        raise InputError("lorakit check looks at one process: start it without torchrun")
    if contact_sheet is not None:
        require_sheet_place(contact_sheet)
    console = open_console(soft_wrap=True)
    result = run(recipe, with_forecast=forecast)
    setup = result.setup
    for index in range(min(show, len(setup.data.train))):
        _show_row(console, setup.data.train[index].where, shown_row(setup, index))
    _show_rows(console, result.statistics)
    _show_preferences(result.statistics)
    _show_pictures(result.pictures)
    for finding in setup.data.findings:
        line = f"! {finding.line}" if finding.count else f"✓ no row is {finding.what}"
        style = "yellow" if finding.count else ""
        console.print(one_line(line), style=style)
    trained, total = setup.model.get_nb_trainable_parameters()
    _show_modules(result.modules, trained, total)
    lines = [f"chosen: {advice.line}" for advice in setup.advice] + setup.notices
    for line in [*lines, *([result.forecast.line] if result.forecast else [])]:
        console.print(one_line(line))
    if contact_sheet is None:
        return
    if "train" not in result.pictures:
        raise InputError("--contact-sheet: no row to learn from has a picture; leave it out")
    shown = write_contact_sheet(
        contact_sheet,
        recipe.model,
        Path(result.setup.data_facts[0]["path"]),
        list(zip(setup.data.train_samples, setup.data.train, strict=True)),
        result.pictures["train"],
        contact_sheet_rows,
    )
    console.print(f"wrote {contact_sheet}: the pictures of {count(shown, 'row')}")


def _show_row(console: Console, where: str, pieces: list[ShownPiece]) -> None:
    """A row's text: in colour, or where there is none with marks around what is learned or cut."""
    from itertools import groupby

    from rich.text import Text

    legend = "green is learned, red is cut" if console.color_system else "⟦learned⟧ ✂cut✂"
    console.print(f"{where}, {legend}, the rest is only read:", style="bold")
    if console.color_system:
        text = Text()
        for i, piece in enumerate(pieces):
            text.append(_visible(piece.text), _SHADES[piece.state][i % 2])
        console.print(text)
    else:
        for state, group in groupby(pieces, lambda piece: piece.state):
            opening, closing = _MARKS[state]
            console.print(
                opening + "".join(_visible(piece.text) for piece in group) + closing, end=""
            )
        console.print()
    console.print()


def _visible(text: str) -> str:
    return printable(text.replace("\n", "↵\n"))


def _show_rows(console: Console, statistics: dict[str, RowStatistics]) -> None:
    lengths = ("min", "p5", "p25", "p50", "p75", "p95", "max")
    rows = [
        (
            part,
            f"{numbers.rows:,}",
            f"{numbers.tokens:,}",
            f"{numbers.supervised_share:.0%}",
            *(f"{numbers.lengths[name]:,}" for name in lengths),
        )
        for part, numbers in statistics.items()
    ]
    print_table("rows and tokens", ("", "rows", "tokens", "supervised", *lengths), rows)
    histogram = statistics["train"].histogram
    most = max(count for *_, count in histogram)
    for low, high, count in histogram:
        bar = "█" * round(_BAR * count / most)
        console.print(f"{low:>7,} to {high - 1:<7,} {bar} {count:,}")
    console.print()


def _show_preferences(statistics: dict[str, RowStatistics]) -> None:
    """How many answers are better and worse ones, and how long; nothing of other rows."""
    rows = [
        (
            part,
            f"{figures.chosen:,}",
            f"{figures.rejected:,}",
            f"{figures.chosen_tokens:g}",
            f"{figures.rejected_tokens:g}",
            "" if figures.chosen_longer is None else f"{figures.chosen_longer:.0%}",
        )
        for part, numbers in statistics.items()
        if (figures := numbers.preferences)
    ]
    if rows:
        columns = ("", "chosen", "rejected", "median tokens", "rejected", "chosen is longer")
        print_table("chosen (desirable) and rejected (undesirable) answers", columns, rows)


def _show_pictures(pictures: dict[str, PictureFigures]) -> None:
    """How many pictures there are, their sizes and their tokens; nothing without any."""
    rows = [
        (
            part,
            f"{figures.pictures:,}",
            f"{figures.files:,}",
            *(f"{tokens:,}" for tokens in figures.tokens),
            f"{figures.share:.0%}",
            *(f"{width} × {height}" for width, height in figures.sizes),
        )
        for part, figures in pictures.items()
    ]
    if rows:
        tokens = ("tokens: min", "p50", "max", "of all")
        columns = ("", "pictures", "files", *tokens, "pixels: min", "p50", "max")
        print_table("pictures", columns, rows)


def _show_modules(modules: list[ModuleKind], trained: int, total: int) -> None:
    rows = [
        (
            kind.name,
            *(
                "whole" if size is None else f"{size:,}"
                for size in (kind.d_in, kind.d_out, kind.count, kind.r)
            ),
            f"{kind.trained:,}",
            f"{kind.ratio:.2%}",
        )
        for kind in modules
    ]
    title = f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
    print_table(title, ("module", "d_in", "d_out", "count", "r", "trained", "r(d+k)/dk"), rows)
