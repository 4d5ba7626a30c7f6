"""A new verb is one function and one registered line, and it is in the help."""

import pytest
from typer.testing import CliRunner

from lorakit.cli import main
from lorakit.console import say


def greet(name: str, loudly: bool = False) -> None:
    """Say hello."""
    say(f"hello {name}".upper() if loudly else f"hello {name}")


def test_a_registered_verb_runs_and_is_in_the_help(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(main, "VERBS", dict(main.VERBS))
    main.register("Tools", "greet", f"{__name__}:greet")
    said = CliRunner().invoke(main.app, ["greet", "world", "--loudly"])
    assert (said.output, said.exit_code) == ("HELLO WORLD\n", 0)
    shown = CliRunner().invoke(main.app, ["--help"]).output
    assert [line.split() for line in shown.splitlines() if "greet" in line] == [
        ["greet", "Say", "hello."]
    ]
    assert CliRunner().invoke(main.app, ["greet"]).exit_code == 2
