"""`lorakit train`: a recipe to an adapter."""

import gc
from pathlib import Path
from typing import Annotated

import typer

from lorakit.errors import InputError


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE.yaml] [KEY=VALUE]...",
            help="A recipe, and values that take the place of its own (lora.r=16).",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model: alias, folder, .gguf file, or hub id.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The rows to learn from: json, jsonl, csv or parquet.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(help="Where the adapter goes.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--continue", help="As --resume, although the recipe or the data changed."),
    ] = False,
) -> None:
    """Train an adapter, from a recipe or from the command line alone."""
    # Imports and loading make a million objects, of which none is garbage.
    gc.disable()
    recipe, overrides = _split(arguments or [])
    for key, value in (("model", model), ("data.train", data), ("output_dir", output_dir)):
        if value is not None:
            overrides.append((key, value))
    from lorakit.training.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)

    from lorakit.training.machine import is_main_process
    from lorakit.training.run import train as run

    gc.freeze()
    gc.enable()
    resume = resume or accept_changes
    manifest = run(loaded, resume=resume, accept_changes=accept_changes).manifest
    if not is_main_process():
        return
    typer.echo(f"adapter: {loaded.output_dir}")
    typer.echo(
        f"{manifest.steps} steps in {manifest.train_seconds:.0f} s: "
        f"{manifest.train_tokens:,} tokens ({manifest.tokens_per_second:.0f}/s), "
        f"{manifest.supervised_tokens:,} supervised, peak memory {manifest.peak_memory_mb:,.0f} MB"
    )
    if manifest.eval_loss is not None:
        typer.echo(
            f"held-out loss: {manifest.base_eval_loss:.4f} before, {manifest.eval_loss:.4f} after"
        )
    for name, score in (manifest.eval_scores or {}).items():
        before = (manifest.base_eval_scores or {})[name]
        typer.echo(f"held-out {name}: {before:.4f} with the untrained head, {score:.4f} after")


def _split(arguments: list[str]) -> tuple[Path | None, list[str | tuple[str, str]]]:
    """The recipe's path, if one is given, and the overrides."""
    paths = [a for a in arguments if "=" not in a or Path(a).is_file()]
    if len(paths) > 1:
        raise InputError(
            f"give one recipe, not {len(paths)} ({', '.join(paths)}): values are KEY=VALUE"
        )
    return (Path(paths[0]) if paths else None), [a for a in arguments if a not in paths]
