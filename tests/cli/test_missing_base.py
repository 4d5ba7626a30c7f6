"""Where the base model is missing, the option that the verb has for it is named."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from lorakit.cli.main import main

VERBS = {
    "inspect": (["--base", "no-such-model"], "--base"),
    "merge": (["-o", "out"], "--base"),
    "export": (["--to", "ollama", "-o", "out"], "--base"),
    "generate": (["--prompts", "prompts.txt"], "--model"),
    "serve": (["--port", "0"], "--model"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_missing_base_names_the_verbs_own_option(
    verb: str,
    tiny_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = shutil.copytree(tiny_adapter, tmp_path / "a")
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    config.write_text(json.dumps(values))
    (tmp_path / "prompts.txt").write_text("hello\n")
    monkeypatch.chdir(tmp_path)
    options, wanted = VERBS[verb]
    monkeypatch.setattr(sys, "argv", ["lorakit", verb, str(folder), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    other = {"--base": "--model", "--model": "--base"}[wanted]
    assert f"with {wanted}" in said
    assert other not in said
    assert "Traceback" not in said
