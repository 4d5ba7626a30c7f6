"""`lorakit merge`: an adapter and its base to a plain model."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder for the model.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, when it is not the recorded one.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the written weights; default: that of the base.")
    ] = None,
) -> None:
    """Merge an adapter into its base model and compare the result with both together."""
    from lorakit.adapters.merge import merge as run

    report = run(adapter, output, base=base, dtype=dtype)
    typer.echo(f"merged model: {report.output} ({report.modules} modules, {report.dtype})")
    typer.echo(
        f"read back and compared with base + adapter over {report.positions} positions: "
        f"largest logit difference {report.largest_difference:.3g} "
        f"(the adapter itself moves logits by {report.adapter_effect:.3g}; "
        f"{report.lost_share:.1%} of that is lost to rounding), "
        f"top-1 agreement {report.top1_agreement:.1%}"
    )
