"""The command table, and what every command does with an error.

A verb's own file imports nothing heavy until it runs, so that `lorakit --help` is immediate.
"""

import os
import sys
from typing import Annotated

import click
import typer

from lorakit import __version__
from lorakit.cli.chat import chat
from lorakit.cli.demo import demo
from lorakit.cli.eval import evaluate
from lorakit.cli.merge import merge
from lorakit.cli.train import train
from lorakit.errors import LorakitError

app = typer.Typer(
    name="lorakit",
    help="LoRA for language models: train, evaluate, chat with and merge low-rank adapters.",
    epilog="lorakit demo shows it all in a few minutes. --debug, anywhere, shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command("eval")(evaluate)
app.command()(chat)
app.command()(merge)
app.command()(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorakit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """LoRA for language models: train, evaluate, chat with and merge low-rank adapters."""


def main() -> None:
    """Runs a command; every failure is one line on standard error, and an exit code.

    2: what the user gave cannot be used. 1: it failed while running. 130: interrupted.
    """
    debug = "--debug" in sys.argv or bool(os.environ.get("LORAKIT_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    # Libraries speak when something is wrong; their hints and progress are not for this screen.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = app(standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        code = 2
    except click.ClickException as error:
        code = _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except LorakitError as error:
        if debug:
            raise
        code = _fail(str(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        code = _fail(f"{kind}: {error} (this is not foreseen: --debug shows where)", 1)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    typer.echo(f"error: {line}", err=True)
    return code


if __name__ == "__main__":
    main()
