"""The command table, and what every command does with an error.

A verb's own file imports nothing heavy until it runs, so that `lorakit --help` is immediate.
"""

import errno
import logging
import os
import sys
import warnings
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lorakit.cli.recipes import option_hint
from lorakit.console import say, settle_streams
from lorakit.errors import BASE_OPTION, InputError, LorakitError, one_line
from lorakit.models import remote_code
from lorakit.progress import showing
from lorakit.training.processes import first_to_fail
from lorakit.version import __version__

# typer's errors of usage are click's, or those of its own copy of click in newer releases.
UsageError: Any = typer.BadParameter.__mro__[1]

_INTERRUPTED = 130  # as shells have it: 128 and the signal's number

_GROUPS: dict[str, list[str]] = {}
"""The verbs by what they are for, in the order of the help."""


class _GroupedHelp(TyperGroup):
    """The commands of the help under the headings of `_GROUPS`."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        for group, verbs in _GROUPS.items():
            with formatter.section(group):
                formatter.write_dl(
                    [(verb, self.commands[verb].get_short_help_str(width)) for verb in verbs]
                )


app = typer.Typer(
    name="lorakit",
    cls=_GroupedHelp,
    help="LoRA for language models: train, evaluate, chat with and merge low-rank adapters.",
    epilog="lorakit demo shows it all in a few minutes. Anywhere: --debug shows tracebacks, "
    "--trust-remote-code runs code that a model brings.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def register(group: str, verb: str, function: str) -> None:
    """Adds a verb under a heading of the help.

    Args:
        function: `module:name`; its signature says what typer parses.
    """
    module, _, name = function.partition(":")
    _GROUPS.setdefault(group, []).append(verb)
    app.command(verb)(getattr(import_module(module), name))


register("Data", "check", "lorakit.cli.check:check")
register("Train", "train", "lorakit.cli.train:train")
register("Train", "sweep", "lorakit.cli.sweep:sweep")
register("Train", "reproduce", "lorakit.cli.reproduce:reproduce")
register("Compare", "eval", "lorakit.cli.eval:evaluate")
register("Compare", "report", "lorakit.cli.report:report")
register("Compare", "inspect", "lorakit.cli.inspect:inspect")
register("Compare", "diff", "lorakit.cli.diff:diff")
register("Ship", "merge", "lorakit.cli.merge:merge")
register("Ship", "export", "lorakit.cli.export:export")
register("Ship", "push", "lorakit.cli.hub:push")
register("Ship", "pull", "lorakit.cli.hub:pull")
register("Serve", "chat", "lorakit.cli.chat:chat")
register("Serve", "generate", "lorakit.cli.generate:generate")
register("Serve", "serve", "lorakit.cli.serve:serve")
register("Tools", "models", "lorakit.cli.models:models")
register("Tools", "convert", "lorakit.cli.convert:convert")
register("Tools", "import", "lorakit.cli.import_adapter:import_adapter")
register("Tools", "combine", "lorakit.cli.combine:combine")
register("Tools", "resize", "lorakit.cli.resize:resize")
register("Tools", "extract", "lorakit.cli.extract:extract")
register("Tools", "demo", "lorakit.cli.demo:demo")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorakit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """LoRA for language models: train, evaluate, chat with and merge low-rank adapters."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


def main() -> None:
    """Runs a command; every failure is one line on standard error, and an exit code.

    2: what the user gave cannot be used. 1: it failed while running. 130: interrupted.
    """
    _in_utf8()
    settle_streams()
    debug = _given("--debug") or bool(os.environ.get("LORAKIT_DEBUG"))
    if _given(remote_code.OPTION):
        os.environ[remote_code.VARIABLE] = "1"
    # Libraries speak when something is wrong; their hints and progress are not for this screen.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.formatwarning = _as_notice
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with showing():
            code = app(standalone_mode=False) or 0
        if code == _INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            code = _fail("interrupted", code)
    except UsageError as error:
        code = _fail_as_one(option_hint(error) or error.format_message(), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except LorakitError as error:
        if debug:
            raise
        code = _fail_as_one(_with_own_option(str(error)), error.exit_code)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            sys.exit(_fail_as_one(f"{error.filename}: {error.strerror}", InputError.exit_code))
        kind = type(error).__name__
        code = _fail_as_one(f"{kind}: {error} (this is not foreseen: --debug shows where)", 1)
    sys.exit(code)


def _in_utf8() -> None:
    """Starts anew in Python's UTF-8 mode where names were given that the locale cannot read.

    Python does so by itself in a C locale, unless PYTHONUTF8=0 forbids it. Streams keep their
    encoding.
    """
    readable = all(argument.isprintable() or "\n" in argument for argument in sys.argv)
    if readable or os.name != "posix" or sys.getfilesystemencoding() == "utf-8":
        return
    streams = {"PYTHONIOENCODING": getattr(sys.stdout, "encoding", None) or "utf-8"}
    environment = streams | dict(os.environ) | {"PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "lorakit", *sys.argv[1:]], environment)


def _with_own_option(message: str) -> str:
    """A message that asks for a base model with the option that the verb at hand has for it."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    command: Any = getattr(typer.main.get_command(app), "commands", {}).get(verb)
    options = {option for one in getattr(command, "params", ()) for option in one.opts}
    own = next((option for option in ("--base", "--model") if option in options), BASE_OPTION)
    return message.replace(BASE_OPTION, own)


def _given(option: str) -> bool:
    """Whether the option is there, which every verb takes; it is taken off the command line."""
    found = option in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != option]
    return found


def _as_notice(message: Warning | str, *where: object, **line: object) -> str:
    """A warning as one line, without the place in the code that gave it."""
    return f"notice: {one_line(str(message))}\n"


def _fail(message: str, code: int) -> int:
    say(f"error: {one_line(message)}", err=True)
    return code


def _fail_as_one(message: str, code: int) -> int:
    """As `_fail`; of the several processes of a run, the first that fails says it."""
    return _fail(message, code) if first_to_fail() else code


if __name__ == "__main__":
    main()
