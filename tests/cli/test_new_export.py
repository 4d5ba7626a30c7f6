"""A new export is one function and one registered line; the verb needs nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorakit.adapters.export import export_formats
from lorakit.adapters.export.export_formats import Exported
from lorakit.adapters.export.plain import read_plain
from lorakit.cli.main import app
from lorakit.errors import InputError


def write_ranks(adapter: Path, output: Path, *, base: str | None, dtype: str = "-") -> Exported:
    """Writes every module's rank as JSON."""
    plain = read_plain(adapter, "ranks.json", base)
    ranks = {path: pair.r for path, pair in plain.pairs.items()}
    output.write_text(json.dumps(ranks))
    return Exported(str(output), f"ranks: {len(ranks)} modules, {dtype}", f"cat {output}")


def test_a_registered_export_is_written_by_the_verb(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(export_formats.FORMATS, "ranks", None)  # is taken away at the end
    export_formats.register("ranks", f"{__name__}:write_ranks", "dtype")
    output = tmp_path / "ranks.json"

    def run(*more: str) -> Any:
        wanted = ["export", str(tiny_adapter), "--to", "ranks", "-o", str(output), *more]
        return CliRunner().invoke(app, wanted)

    refused = run("--merged")
    assert isinstance(refused.exception, InputError)
    assert not output.exists()
    done = run("--dtype", "int4")
    assert done.output.splitlines() == ["ranks: 14 modules, int4", f"cat {output}"], done
    assert set(json.loads(output.read_text()).values()) == {4}
