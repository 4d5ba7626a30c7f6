"""`lorakit push` and `lorakit pull`: an adapter to the Hugging Face hub and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorakit.console import say, say_all
from lorakit.errors import InputError

if TYPE_CHECKING:
    from lorakit.adapters.hub import Selection

Repository = Annotated[str, typer.Argument(help="The repository on the hub: owner/name.")]


def push(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    repository: Repository,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; default: main.")] = None,
    with_record: Annotated[
        bool,
        typer.Option(
            "--with-record", help="Upload lorakit.json too, which names the data's paths."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Upload without asking.")] = False,
) -> None:
    """Upload an adapter to the Hugging Face hub.

    What would be uploaded is shown first.
    """
    from lorakit.adapters.hub import push as run

    def confirm(chosen: Selection) -> bool:
        for name, size in chosen.files.items():
            say(f"  {name} ({size:,} bytes)")
        if chosen.left_out:
            say(f"stays here: {', '.join(chosen.left_out)}")
        say_all(chosen.notices, err=False)
        if yes:
            return True
        if not sys.stdin.isatty():
            raise InputError(
                "cannot ask for confirmation without a terminal: --yes uploads without asking"
            )
        return typer.confirm(f"upload to {repository}?")

    say(f"to {repository}{f' ({revision})' if revision else ''}:")
    address = run(
        adapter,
        repository,
        private=private or None,
        revision=revision,
        with_record=with_record,
        confirm=confirm,
    )
    say(f"uploaded: {address}" if address else "nothing was uploaded")


def pull(
    repository: Repository,
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder for the adapter.")],
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit; default: main.")
    ] = None,
) -> None:
    """Fetch an adapter from the Hugging Face hub."""
    from lorakit.adapters.hub import pull as run

    names = run(repository, output, revision=revision)
    say(f"adapter: {output} ({', '.join(names)})")
