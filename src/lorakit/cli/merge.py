"""`lorakit merge`: adapters and their base to a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.cli.shared_options import BaseOption, QuantizationOption, numbers
from lorakit.console import say, say_all

if TYPE_CHECKING:
    from lorakit.adapters.merge import MergeReport

_FEW = 3  # modules that are named, those that lost most
_MUCH = 0.95  # less of ΔW than this is worth a hint


def merge(
    adapter: Annotated[list[Path], typer.Argument(help="The adapter's folder, or several.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder for the model.")],
    base: BaseOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="The dtype of the written weights. Default: the base's.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A comma-separated weight for each adapter, as 1.0,0.5.")
    ] = None,
    quantization: QuantizationOption = None,
    in_memory: Annotated[
        bool, typer.Option("--in-memory", help="Load the whole model, merge and save it.")
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="Compare the merged model with base + adapter.")
    ] = True,
) -> None:
    """Merge adapters into their base model, and verify the result.

    The weights are merged file by file, and the result is compared with base and adapters.
    """
    from lorakit.adapters.merge import merge as run

    report = run(
        adapter,
        output,
        base=base,
        dtype=dtype,
        weights=None if weights is None else numbers("--weights", weights),
        quantization=quantization,
        in_memory=in_memory,
        verify=verify,
    )
    say_all(report.notices)
    say(f"merged model: {report.output} ({report.modules} modules, {report.dtype})")
    say(_survived(report))
    if report.passed is not None:
        say(
            f"read back and compared with base + adapter over {report.positions} positions: "
            f"largest logit difference {report.largest_difference:.3g} "
            f"(the adapter itself moves logits by {report.adapter_effect:.3g}; "
            f"{report.lost_share:.1%} of that is lost to rounding), "
            f"KL {report.kl:.2g} nats, top-1 agreement {report.top1_agreement:.1%}"
        )


def _survived(report: MergeReport) -> str:
    line = f"{report.survived:.1%} of the update survived the rounding to {report.dtype}"
    if report.survived >= _MUCH:
        return line
    worst = sorted(report.survived_by_module.items(), key=lambda item: item[1])[:_FEW]
    named = ", ".join(f"{module} {share:.1%}" for module, share in worst)
    return f"{line} (least: {named}); --dtype float32 keeps all of it, in a larger model"
