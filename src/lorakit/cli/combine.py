"""`lorakit combine`: several adapters to one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.shared_options import numbers
from lorakit.console import say, say_all

if TYPE_CHECKING:
    from lorakit.adapters.derived import KindRanks


def combine(
    adapters: Annotated[list[Path], typer.Argument(help="The adapters' folders.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder.")],
    weights: Annotated[
        str, typer.Option(help="A comma-separated weight for each adapter: 0.7,0.3 (or 1,-1).")
    ],
    method: Annotated[
        str,
        typer.Option(
            help="linear or cat (the weighted sum, exact), svd, ties, dare_linear, dare_ties, "
            "magnitude_prune, knots."
        ),
    ] = "linear",
    rank: Annotated[
        int | None,
        typer.Option(
            help="The highest rank of a module. Default: the sum of the ranks (linear, cat, "
            "knots) or the largest of them."
        ),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of entries to keep, above 0 and up to 1.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Random seed for dare_linear and dare_ties. Default: 0.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, where the adapters name it differently.")
    ] = None,
) -> None:
    """Combine adapters of one base model into one.

    The model is not loaded.
    """
    from lorakit.adapters.combine import combine as run

    report = run(
        adapters,
        output,
        weights=numbers("--weights", weights),
        method=method,
        rank=rank,
        density=density,
        seed=seed,
        base=base,
    )
    say_all(report.notices)
    show_kinds(report.kinds)
    say(
        f"combined by {report.method}: {report.output} ({report.modules} modules, "
        f"{report.parameters:,} parameters)"
    )
    exact = "nothing was cut off" if report.lost == 0 else f"{report.lost:.3%} of ‖ΔW‖² is lost"
    say(f"{exact} to the rank")


def show_kinds(kinds: "list[KindRanks]") -> None:
    """Prints ranks and losses by kind of module."""
    from lorakit.cli.tables import print_table, spread

    rows = [
        (k.kind, str(k.modules), spread(k.ranks), f"{k.lost:.3%}", f"{k.error:.3%}") for k in kinds
    ]
    print_table("", ("module", "number", "rank", "‖ΔW‖² lost", "error of ΔW"), rows)
