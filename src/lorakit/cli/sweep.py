"""`lorakit sweep`: many configurations of a recipe, and which of them is the best."""

import gc
from typing import Annotated, Any

import typer

from lorakit.cli.recipes import Arguments, Data, Model, split_arguments
from lorakit.console import open_console, say


def sweep(
    arguments: Arguments = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            help="A key and its values: lora.r=4,8,16, or a range for --sampler (lora.r=4..64). "
            "Repeat it for each key.",
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
    output_dir: Annotated[str | None, typer.Option(help="The output folder.")] = None,
    sampler: Annotated[
        str | None,
        typer.Option(help="grid (all), random, or Optuna's tpe, gp, cmaes, qmc, nsgaii."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many configurations a sampler draws.")
    ] = None,
    no_prune: Annotated[
        bool,
        typer.Option(
            "--no-prune", help="Train every configuration to its end, without early stopping."
        ),
    ] = False,
    reduction_factor: Annotated[
        int | None,
        typer.Option(help="At each rung, one in this many configurations continues. Default: 3."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="What the best is chosen by: loss, a held-out score (accuracy, margin, …), or a "
            "metric of lorakit eval."
        ),
    ] = None,
    selection: Annotated[
        float | None,
        typer.Option(help="The share of the held-out rows used for choosing. Default: 0.5."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Random seed of the sampler and the split. Default: training.seed."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="together (shared batches), solo (one after the other) or ray."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="The number of workers for --engine ray.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the sweep in the output folder.")
    ] = False,
) -> None:
    """Train many configurations together, and find the best.

    They share one base model; losing configurations are stopped early.
    """
    # Imports and loading make a million objects, of which none is garbage.
    gc.disable()
    recipe, overrides = split_arguments(arguments or [])
    options = {"model": model, "data.train": data, "output_dir": output_dir}
    overrides += [(key, value) for key, value in options.items() if value is not None]
    settings = {
        "sampler": sampler,
        "trials": trials,
        "prune": False if no_prune else None,
        "reduction_factor": reduction_factor,
        "objective": objective,
        "selection": selection,
        "seed": seed,
        "engine": engine,
        "workers": workers,
    }
    from lorakit.sweeps.space.sweep_settings import load_sweep

    complete, wishes = load_sweep(recipe, overrides, over or (), settings)

    from lorakit.sweeps.run_sweep import run_sweep

    gc.freeze()
    gc.enable()
    table = run_sweep(complete, wishes, resume=resume, say=lambda line: say(line, err=True))
    _show(table, complete.output_dir)


def _show(table: dict[str, Any], folder: str) -> None:
    from rich import box
    from rich.table import Table

    shown = Table("configuration", "steps", box=box.SIMPLE)
    for name in (table["objective"], "behind", ""):
        shown.add_column(name, justify="right" if name else "left")
    for row in table["configurations"]:
        shown.add_row(row["name"], f"{row['step']}/{row['planned_steps']}", *_figures(row))
    console = open_console()
    console.print(shown)
    steps = table["steps"]
    console.print(table["verdict"], soft_wrap=True)
    if table["ranks"]:
        console.print(table["ranks"]["line"], soft_wrap=True)
    saved = f"{steps['done']:,} of {steps['planned']:,} steps were trained"
    console.print(f"{saved}: stopping losers saved {steps['saved']:.0%}", soft_wrap=True)
    console.print(f"winner: {folder}/{table['winner']}; table: {folder}/sweep.html", soft_wrap=True)


def _figures(row: dict[str, Any]) -> tuple[str, str, str]:
    """The report rows' value, how far the winner is from it, each ± half an interval; a remark."""
    if row["diverged"]:
        return "", "", f"dropped: {row['diverged']}"
    remark = "winner" if row["status"] == "winner" else ""
    if row["status"] == "stopped":
        remark = f"stopped at {row['share']:.0%}"
    if row["no_difference"]:
        remark = f"no difference {remark}"
    return _with_half(row["report"], ""), _with_half(row["behind"], "+"), remark.strip()


def _with_half(interval: dict[str, float] | None, sign: str) -> str:
    if interval is None:
        return ""
    half = (interval["high"] - interval["low"]) / 2
    return f"{interval['mean']:{sign}.4f} ±{half:.4f}"
