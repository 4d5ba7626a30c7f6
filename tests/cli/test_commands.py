"""The verbs one after the other, as a person would run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from command import Command, Done
from lorakit.cli.main import VERBS
from lorakit.demo.run import run_demo


def done(result: Done) -> str:
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "Warning" not in result.stderr
    return result.stdout


def test_help_and_version_import_nothing_heavy():
    code = (
        "import sys; import lorakit.cli.main; "
        "heavy = {'torch', 'transformers', 'pydantic', 'pyarrow', 'rich.console', 'hashlib', "
        "'lorakit.models.load'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_lists_every_verb_under_what_it_is_for(lorakit_command: Command):
    text = done(lorakit_command("--help"))
    groups = dict.fromkeys(("Data", "Train", "Compare", "Ship", "Serve", "Tools"), "")
    for block in text.split("\n\n"):
        heading, _, verbs = block.partition(":\n")
        if heading in groups:
            groups[heading] = verbs
    assert [heading for heading in groups if f"\n{heading}:\n" in text] == list(groups)
    listed = [line.split()[0] for verbs in groups.values() for line in verbs.splitlines()]
    assert sorted(listed) == sorted(VERBS)
    for heading, verb in {"Data": "check", "Train": "train", "Ship": "merge"}.items():
        assert f"  {verb} " in groups[heading]
    assert "..." not in "".join(groups.values())  # no summary is cut off at 80 columns


@pytest.mark.parametrize(
    "lorakit",
    [
        pytest.param("lorakit_command", id="in this process"),
        pytest.param("lorakit_process", id="as processes", marks=pytest.mark.exhaustive),
    ],
)
def test_train_from_flags_alone_then_eval_chat_and_merge(
    request: pytest.FixtureRequest, lorakit: str, tiny_model: Path, rows: Path, tmp_path: Path
):
    lorakit_command: Command = request.getfixturevalue(lorakit)
    flags = ["--model", tiny_model, "--data", rows, "--output-dir", "run"]
    out = done(lorakit_command("train", *flags, "lora.r=4", "training.max_steps=3"))
    assert "adapter: run" in out
    assert "held-out loss:" in out

    out = done(
        lorakit_command(
            "eval", "run", "--data", rows, "--json", "scores.json", "--max-new-tokens", "8"
        )
    )
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["rows"] == 20
    assert set(scores["scores"]) == {"exact_match", "bleu", "rouge", "loss"}
    for name in scores["scores"]:
        assert name in out
    assert len(scores["examples"]) == 20

    out = done(lorakit_command("chat", "run", "--max-new-tokens", "4", stdin="/base\nhello\n"))
    assert "the base answers now" in out

    out = done(lorakit_command("merge", "run", "-o", "merged"))
    assert "largest logit difference" in out
    assert "top-1 agreement" in out
    if lorakit == "lorakit_command":
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.float32
        return
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; import sys; "
        "m = M.from_pretrained('merged'); T.from_pretrained('merged'); "
        "assert 'lorakit' not in sys.modules; print(m.dtype)"
    )
    plain = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert plain.stdout.strip() == "torch.float32"


def test_train_reads_a_recipe_and_its_overrides(
    lorakit_command: Command, tiny_model: Path, rows: Path, tmp_path: Path
):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny_model}\ndata: {{train: {rows}, eval: 0}}\nlora: {{r: 2}}\n"
        "training: {max_steps: 2}\noutput_dir: run\n"
    )
    done(lorakit_command("train", "recipe.yaml", "lora.r=3", "training.max_steps=1"))
    manifest = json.loads((tmp_path / "run" / "lorakit.json").read_text())
    assert manifest["recipe"]["lora"]["r"] == 3
    assert manifest["steps"] == 1
    assert manifest["eval_loss"] is None
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in weights.items() if "lora_A" in name} == {3}
    assert all(t.dtype == torch.float32 for t in weights.values())


@pytest.mark.exhaustive
def test_the_demo_trains_the_real_model_and_writes_what_it_measured(tmp_path: Path):
    said: list[str] = []
    result = run_demo(tmp_path / "demo", said.append, train_rows=40, held_out_rows=6)
    written = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert written == {
        "base_exact_match": result.base_exact_match,
        "tuned_exact_match": result.tuned_exact_match,
        "seconds": result.seconds,
        "rows": 6,
    }
    manifest = json.loads((tmp_path / "demo" / "adapter" / "lorakit.json").read_text())
    assert manifest["eval_loss"] < 0.5 < manifest["base_eval_loss"]
    text = "\n".join(said)
    assert text.count("  before  ") == text.count("  after   ") == 3
    for verb in ("chat", "eval", "merge", "train"):
        assert f" {verb} " in text[text.index("Try next") :]
