"""`lorakit extract`: an adapter out of a full fine-tune."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.combine import show_kinds
from lorakit.console import say, say_all, say_json


def extract(
    base: Annotated[str, typer.Argument(help="The base model: alias, folder, or hub id.")],
    tuned: Annotated[str, typer.Argument(help="The fully fine-tuned model.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder.")],
    rank: Annotated[int | None, typer.Option(help="The highest rank of a module.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="The share of each module's ‖ΔW‖² to keep. Default: 0.95.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what every module retains, as JSON.")
    ] = False,
) -> None:
    """Write the difference of two models as an adapter.

    Both are read tensor by tensor.
    """
    from dataclasses import asdict

    from lorakit.adapters.extract import extract as run

    report = run(base, tuned, output, rank=rank, energy=energy)
    say_all(report.notices)
    if as_json:
        say_json(asdict(report))
        return
    show_kinds(report.kinds)
    least = sorted(report.retained.items(), key=lambda pair: pair[1])[:3]
    shown = ", ".join(f"{path} {share:.2%}" for path, share in least)
    say(f"least energy is retained in {shown} (--json has every module)")
    say(
        f"extracted: {report.output} ({report.modules} modules, {report.parameters:,} parameters), "
        f"error of ΔW over all: {report.error:.3%}"
    )
