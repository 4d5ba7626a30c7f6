"""The command table, and what every command does with an error.

A verb's module is imported when its command is asked for, so that `lorakit --help` is immediate.
"""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lorakit.console import say, settle_streams
from lorakit.errors import BASE_OPTION, InputError, LorakitError, one_line
from lorakit.models import remote_code
from lorakit.openmp import ask_for_what_there_is, spin_briefly
from lorakit.progress import showing
from lorakit.version import __version__

# typer's errors of usage are click's, or those of its own copy of click in newer releases.
UsageError: Any = typer.BadParameter.__mro__[1]

_INTERRUPTED = 130  # as shells have it: 128 and the signal's number
_PLAIN: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}


@dataclass(frozen=True)
class Verb:
    """A verb under a heading of the help, and the `module:name` of its function."""

    name: str
    heading: str
    function: str

    def command(self) -> Any:
        """What typer makes of the function's signature."""
        module, _, function = self.function.partition(":")
        alone = typer.Typer(**_PLAIN)
        alone.command(self.name)(getattr(import_module(module), function))
        return typer.main.get_command(alone)

    def summary(self) -> str:
        """The first line of the function's docstring, from the source: importing takes longer."""
        module, _, function = self.function.partition(":")
        read = getattr(getattr(find_spec(module), "loader", None), "get_source", lambda _: None)
        body = (read(module) or "").partition(f"\ndef {function}(")[2]
        line = body.partition('"""')[2].partition("\n")[0].removesuffix('"""')
        return line or self.command().get_short_help_str(200)


VERBS: dict[str, Verb] = {}
"""The verbs by name, in the order of the help."""


class _Commands(Mapping[str, Any]):
    """The verbs' commands, each made when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        return VERBS[name].command()

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


class _Group(TyperGroup):
    """`VERBS` as typer's commands, listed under their headings."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"commands": _Commands()})

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading in dict.fromkeys(verb.heading for verb in VERBS.values()):
            verbs = [verb for verb in VERBS.values() if verb.heading == heading]
            with formatter.section(heading):
                formatter.write_dl([(verb.name, verb.summary()) for verb in verbs])


app = typer.Typer(
    name="lorakit",
    cls=_Group,
    help="LoRA for language models: train, evaluate, chat with and merge low-rank adapters.",
    epilog="lorakit demo shows it all in a few minutes. With any command: --debug shows "
    "tracebacks, --trust-remote-code runs a model's own code.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **_PLAIN,
)


def register(heading: str, name: str, function: str) -> None:
    """Adds a verb under a heading of the help.

    Args:
        function: `module:name`; its signature says what typer parses.
    """
    VERBS[name] = Verb(name, heading, function)


register("Data", "check", "lorakit.cli.check:check")
register("Data", "rewards", "lorakit.cli.rewards:rewards")
register("Train", "train", "lorakit.cli.train:train")
register("Train", "sweep", "lorakit.cli.sweep:sweep")
register("Train", "bake", "lorakit.cli.bake:bake")
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
    spin_briefly()
    ask_for_what_there_is()
    warnings.formatwarning = _as_notice
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with showing():
            code = app(standalone_mode=False) or 0
        if code == _INTERRUPTED:  # what typer makes of Ctrl-C, without a word
            code = _fail("interrupted", code)
    except UsageError as error:
        from lorakit.cli.recipes import option_hint

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
        if isinstance(error, (ImportError, RuntimeError)):
            from lorakit.models.torchvision_build import torchvision_trouble

            if trouble := torchvision_trouble():
                sys.exit(_fail_as_one(trouble, InputError.exit_code))
        kind = type(error).__name__
        code = _fail_as_one(f"{kind}: {error} (unexpected; --debug shows the traceback)", 1)
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
    params = VERBS[verb].command().params if verb in VERBS else ()
    options = {option for one in params for option in one.opts}
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
    from lorakit.training.processes import first_to_fail

    return _fail(message, code) if first_to_fail() else code


if __name__ == "__main__":
    main()
