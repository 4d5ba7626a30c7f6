"""`lorakit bake`: a prompt, or a document, to an adapter that answers without it."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.recipes import Arguments, split_arguments
from lorakit.console import open_console, say
from lorakit.errors import InputError
from lorakit.progress import showing


def bake(
    arguments: Arguments = None,
    *,
    system: Annotated[
        Path, typer.Option(help="A text file: the prompt that requests will not need any more.")
    ],
    prompts: Annotated[
        str, typer.Option(help="Questions: a .txt file with one a line, or rows with a prompt.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder for the adapter.")],
    model: Annotated[
        str | None, typer.Option(help="The base model. Default: the bundled one.")
    ] = None,
    answers: Annotated[
        int, typer.Option(min=1, help="How many answers the base gives to each question.")
    ] = 2,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 128,
    max_kl: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Fail above this held-out KL, in nats a token. Default: half of that without "
            "the adapter.",
        ),
    ] = None,
) -> None:
    """Turn a system prompt into an adapter, by distillation.

    The base answers the questions behind the prompt, and the adapter learns to have the same
    probabilities without it. A fifth of the questions is held out to measure how near it comes.
    """
    from lorakit.data.prompts import read_prompts
    from lorakit.models.bundled import ALIAS
    from lorakit.training.bake import bake as run
    from lorakit.training.bake import bake_recipe

    try:
        text = system.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{system} cannot be read as text: {error}") from error
    if not text:
        raise InputError(f"{system} is empty: there is no prompt to bake")
    asked = read_prompts(prompts)
    source, overrides = split_arguments(arguments or [])
    given = [*overrides, ("output_dir", str(output)), ("model", model or ALIAS)]
    recipe = bake_recipe(text, source, given, max_new_tokens=max_new_tokens)
    with showing(open_console(stderr=True)):
        found = run(text, asked, recipe, answers=answers, max_kl=max_kl)
    say(f"adapter: {output}")
    say(
        f"held-out KL to the base behind the prompt: {found.kl_before.mean:.3f} without the "
        f"adapter, {found.kl.mean:.3f} with it ({found.kl.low:.3f} to {found.kl.high:.3f}), in "
        f"nats a token: {found.closed:.0%} of the gap closed"
    )
    say(
        f"same most likely token: {found.agreement_before.mean:.1%} without, "
        f"{found.agreement.mean:.1%} with it ({found.agreement.low:.1%} to "
        f"{found.agreement.high:.1%})"
    )
    say(f"each request saves {found.tokens_saved:,} prompt tokens")
