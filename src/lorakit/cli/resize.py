"""`lorakit resize`: an adapter with other ranks."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.combine import show_kinds
from lorakit.console import say


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
        str | None, typer.Option(help="The base model for --data, when it is not the recorded one.")
    ] = None,
) -> None:
    """Cut an adapter to lower ranks.

    To one rank, or to the ranks that keep a share of what it does.
    """
    from lorakit.adapters.resize import resize as run
    from lorakit.errors import InputError

    if data is None and (limit is not None or base is not None):
        raise InputError("--limit and --base are for --data, which is not given")
    samples = []
    if data is not None:  # rows that cannot be read are said before anything is written
        from lorakit.data.dataset import load_samples

        samples = load_samples(data, None, limit)
    report = run(adapter, output, rank=rank, energy=energy)
    for notice in report.notices:
        say(notice, err=True)
    show_kinds(report.kinds)
    say(
        f"resized: {report.output} ({report.modules} modules, {report.before:,} → "
        f"{report.after:,} parameters), error of ΔW over all: {report.error:.3%}"
    )
    if samples:
        from lorakit.evaluation.compare import losses

        before, after = losses([adapter, output], samples, base=base)
        say(f"loss over {len(samples)} rows: {before:.4f} before, {after:.4f} after")
