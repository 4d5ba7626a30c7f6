"""Commands that are printed can be copied, and folders keep the names that users gave them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit
from lorakit import commands
from lorakit.adapters.layout_names import refuse_own_names
from lorakit.engine.adapter_names import named_adapters
from lorakit.errors import InputError
from lorakit.folder_name import folder_name

HOSTILE = ("two words", "it's", "$(touch x)", 'a"b', "semi;colon", "a&b", "中文", "-o", "*")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_quoted_word_is_one_word_of_the_shell(name: str):
    shown = commands.quoted("merge", Path("runs") / name)
    assert shlex.split(shown) == ["merge", f"runs/{name}"]
    if sys.platform != "win32":
        echo = subprocess.run(
            ["sh", "-c", f"printf %s {commands.quoted(name)}"], capture_output=True
        )
        assert echo.stdout.decode() == name


def test_on_windows_its_own_quotes_are_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(commands.os, "name", "nt")
    assert commands.quoted("merge", r"C:\my runs\a", "-o", "b") == r'merge "C:\my runs\a" -o b'


def test_no_source_prints_a_command_with_an_unquoted_path():
    """Every path behind a verb of lorakit's in an f-string is `quoted(...)`."""
    loose = []
    verbs = "train|eval|chat|generate|merge|serve|export|import|check|report|sweep|convert|inspect"
    pattern = re.compile(rf"lorakit (?:{verbs}) (?:-\S+ )?\{{(?!quoted\()")
    for path in Path(lorakit.__file__).parent.rglob("*.py"):
        loose += [f"{path.name}: {found[0]}" for found in pattern.finditer(path.read_text("utf-8"))]
    assert loose == []


def test_what_is_refused_names_a_command_that_can_be_copied():
    key = "transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight"
    with pytest.raises(InputError) as refused:
        refuse_own_names("my runs/o'neil", [f"base_model.model.{key}"])
    command = str(refused.value).partition("here: ")[2].partition(",")[0]
    assert shlex.split(command) == ["lorakit", "import", "my runs/o'neil", "-o", "DIR"]


def test_a_linked_adapter_keeps_the_name_of_its_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "run-17").mkdir()
    latest = tmp_path / "latest"
    Path(latest).symlink_to("run-17")
    assert list(named_adapters([str(latest)])) == ["latest"]
    assert list(named_adapters([f"{latest}/"])) == ["latest"]
    assert folder_name(latest / ".") == folder_name(latest) == "latest"
    monkeypatch.chdir(tmp_path / "run-17")
    assert folder_name(".") == "run-17"
    assert folder_name("../latest") == "latest"
