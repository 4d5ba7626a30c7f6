"""`lorakit reproduce`: a recorded run again, beside the first."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.console import say
from lorakit.folder_name import folder_name

if TYPE_CHECKING:
    from lorakit.training.reproduce import Reproduction


def reproduce(
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter that lorakit trained.")],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="The folder of the second adapter.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model's path, if it has moved.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="The data's path, if it has moved; once for each source."),
    ] = None,
    chain: Annotated[
        bool,
        typer.Option("--chain", help="First repeat the runs of the adapters that it came from."),
    ] = False,
    run_rewards: Annotated[
        bool,
        typer.Option(
            "--run-rewards",
            help="Run the reward functions, environment and tools that the record names.",
        ),
    ] = False,
) -> None:
    """Repeat an adapter's recorded run, and compare the two.

    The exit code is 1 when the second adapter differs.
    """
    from lorakit.training.machine import is_main_process
    from lorakit.training.reproduce import reproduce as run
    from lorakit.training.reproduce import reproduce_chain

    folder = (
        output_dir
        or (adapter.parent if adapter.name else Path("..")) / f"{folder_name(adapter)}-again"
    )
    options: dict[str, Any] = {"model": model, "data": data or (), "run_rewards": run_rewards}
    if chain:
        found = reproduce_chain(adapter, folder, **options)
    else:
        found = [(folder, run(adapter, folder, **options))]
    if is_main_process():
        for place, result in found:
            _show(place, result)
        if not all(result.reproduced for _, result in found):
            raise typer.Exit(1)


def _show(folder: Path, result: "Reproduction") -> None:
    for line in result.changed:
        say(f"changed: {line}")
    for name, (before, after) in result.losses.items():
        say(f"held-out loss, {name}: {before:.4f} then, {after:.4f} now")
    if result.identical:
        say(f"the same adapter to the bit: {folder}")
    else:
        verdict = "reproduced within what machines and releases differ"
        say(
            f"{verdict if result.reproduced else 'not reproduced'}: the adapters differ by up to "
            f"{result.largest_difference:.2g}: {folder}"
        )
