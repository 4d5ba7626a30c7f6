"""Code that a model's folder brings: it runs where the user said so, and nowhere else."""

import json
from pathlib import Path

import pytest

from command import run_lorakit
from tiny import save_tiny_model

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

Path({marker!r}).write_text("it ran")


class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def own_code(tmp_path: Path, marker: Path) -> Path:
    """A model of a kind that transformers does not have, whose code writes `marker`."""
    folder = save_tiny_model(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(marker=str(marker)))
    (folder / "modeling_own.py").write_text(MODEL)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    return folder


TRAIN = (
    *("train", "--model", "model", "--data", "rows.jsonl", "--output-dir", "run"),
    *("training.max_steps=1", "data.eval=0", "samples=0"),
)


def test_it_is_refused_in_one_line_and_does_not_run(own_code: Path, marker: Path, tmp_path: Path):
    check = ("check", *TRAIN[1:5], "samples=0")
    for arguments in (TRAIN, ("models", "model"), check):
        done = run_lorakit(tmp_path, *arguments)
        assert done.returncode == 2, done.stderr
        said = done.stderr.strip().splitlines()
        assert len(said) == 1
        assert "needs code of its own" in said[0]
        assert "--trust-remote-code" in said[0]
        assert not marker.exists()


def test_it_runs_where_it_is_trusted(own_code: Path, marker: Path, tmp_path: Path):
    done = run_lorakit(tmp_path, *TRAIN, "--trust-remote-code")
    assert done.returncode == 0, done.stderr
    assert marker.read_text() == "it ran"
    merged = run_lorakit(tmp_path, "merge", "run", "-o", "merged", "--trust-remote-code")
    assert merged.returncode == 0, merged.stderr
    assert "compared with base + adapter" in merged.stdout


def test_code_that_is_not_needed_is_left_alone(tmp_path: Path, marker: Path):
    folder = save_tiny_model(tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "configuration_own.OwnConfig"}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(marker=str(marker)))
    done = run_lorakit(tmp_path, "models", "model")
    assert done.returncode == 0, done.stderr
    assert "llama" in done.stdout
    assert not marker.exists()
