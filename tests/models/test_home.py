"""A place for converted models that cannot be used is one line that names it and the cure."""

import os
from pathlib import Path

import pytest

from lorakit.errors import InputError
from lorakit.models.bundled import home, usable_folder
from lorakit.models.names import resolve


def spoil(tmp_path: Path, how: str) -> str:
    """A value of `LORAKIT_HOME` that cannot be used."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "models").write_text("x")
    (tmp_path / "shut").mkdir(mode=0o500)
    return {
        "a file": str(tmp_path / "file"),
        "below a file": str(tmp_path / "file" / "below"),
        "a file in the way inside": str(tmp_path / "inner"),
        "a place where nothing can be made": "/proc/lorakit",
        "a folder without permission": str(tmp_path / "shut"),
        "a name that is too long": "x" * 300,
        "nobody's home": "~no-such-user/lorakit",
        "a device": os.devnull,
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        *("a file", "below a file", "a file in the way inside", "a device", "nobody's home"),
        *("a place where nothing can be made", "a name that is too long"),
        pytest.param(
            "a folder without permission",
            marks=pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere"),
        ),
    ],
)
def test_an_unusable_home_is_named_with_its_cure(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LORAKIT_HOME", spoil(tmp_path, how))
    with pytest.raises(InputError, match="LORAKIT_HOME") as error:
        resolve("smollm2-135m-instruct")
    assert "set LORAKIT_HOME to a folder" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_home_is_made_with_its_parents_and_an_empty_one_is_the_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "new" / "er"))
    assert usable_folder("models") == tmp_path / "new" / "er" / "models"
    assert (tmp_path / "new" / "er" / "models").is_dir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAKIT_HOME", "relative")
    assert home() == tmp_path / "relative"
    monkeypatch.setenv("LORAKIT_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert home() == tmp_path / "cache" / "lorakit"
    (tmp_path / "cache").write_text("x")
    with pytest.raises(InputError, match=f"the cache, {tmp_path}/cache/lorakit, cannot be used"):
        home()
