"""`lorakit train`: a recipe to an adapter."""

import gc
from typing import Annotated

import typer

from lorakit.cli.recipes import Arguments, Data, Model, recipe_from
from lorakit.console import say
from lorakit.errors import LorakitError


def train(
    arguments: Arguments = None,
    model: Model = None,
    data: Data = None,
    output_dir: Annotated[str | None, typer.Option(help="The folder for the adapter.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint in the output folder.")
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--continue", help="As --resume, even if the recipe or the data changed."),
    ] = False,
) -> None:
    """Train an adapter, from a recipe or options alone."""
    # Imports and loading make a million objects, of which none is garbage.
    gc.disable()
    options = {"model": model, "data.train": data, "output_dir": output_dir}
    recipe = recipe_from(arguments, options)

    from lorakit.training.machine import is_main_process
    from lorakit.training.run import train as run

    gc.freeze()
    gc.enable()
    resume = resume or accept_changes
    manifest = run(recipe, resume=resume, accept_changes=accept_changes).manifest
    if not is_main_process():
        return
    say(f"adapter: {recipe.output_dir}")
    say(
        f"{manifest.steps} steps in {manifest.train_seconds:.0f} s: "
        f"{manifest.train_tokens:,} tokens ({manifest.tokens_per_second:.0f}/s), "
        f"{manifest.supervised_tokens:,} supervised, peak memory {manifest.peak_memory_mb:,.0f} MB"
    )
    first = "with the untrained head" if manifest.labels else "before"
    at_start: dict[str, float] = manifest.start_eval_scores or {}
    if manifest.start_eval_loss is not None:
        first = "of the base"
        at_start = at_start | {"loss": manifest.start_eval_loss}

    def show(name: str, before: float | None, after: float) -> None:
        start = f", {at_start[name]:.4f} at the start" if name in at_start else ""
        say(f"held-out {name}: {before:.4f} {first}{start}, {after:.4f} after")

    if manifest.eval_loss is not None:
        show("loss", manifest.base_eval_loss, manifest.eval_loss)
    for name, score in (manifest.eval_scores or {}).items():
        show(name, (manifest.base_eval_scores or {})[name], score)
    if any(warning.get("warning") == "unchanged" for warning in manifest.warnings):
        raise LorakitError(
            "nothing was learned: the adapter is unchanged, as a warning in lorakit.json says too"
        )
