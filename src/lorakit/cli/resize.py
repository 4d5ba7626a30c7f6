"""`lorakit resize`: an adapter with other ranks."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.combine import show_kinds
from lorakit.cli.shared_options import rows_to_compare
from lorakit.console import say, say_all


def resize(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder.")],
    rank: Annotated[int | None, typer.Option(help="The highest rank of a module.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="The share of each module's ‖ΔW‖² to keep, above 0 and up to 1."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows to measure the loss on, before and after.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first rows.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model for --data, if not the recorded one.")
    ] = None,
) -> None:
    """Cut an adapter to lower ranks.

    To one rank, or to the ranks that keep a share of ‖ΔW‖².
    """
    from lorakit.adapters.resize import resize as run

    samples = rows_to_compare(data, limit, base)  # before anything is written
    report = run(adapter, output, rank=rank, energy=energy)
    say_all(report.notices)
    show_kinds(report.kinds)
    say(
        f"resized: {report.output} ({report.modules} modules, {report.before:,} → "
        f"{report.after:,} parameters), error of ΔW over all: {report.error:.3%}"
    )
    if samples:
        from lorakit.evaluation.compare import losses

        before, after = losses([adapter, output], samples, base=base)
        say(f"loss over {len(samples)} rows: {before:.4f} before, {after:.4f} after")
