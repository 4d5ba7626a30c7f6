"""The verbs that carry adapters to other programs say what they wrote and how to use it."""

import shutil
from pathlib import Path

import pytest

from command import Command


def test_every_target_is_written_and_its_command_shown(
    lorakit_command: Command, tiny_adapter: Path, tmp_path: Path
):
    vllm = lorakit_command("export", tiny_adapter, "--to", "vllm", "-o", "served")
    assert vllm.returncode == 0, vllm.stderr
    assert vllm.stdout.startswith("for vLLM: served (14 modules, rank 8, scaling 1)\nvllm serve ")
    assert vllm.stdout.endswith("--enable-lora --lora-modules served=served --max-lora-rank 8\n")
    adapter = lorakit_command("export", tiny_adapter, "--to", "gguf", "-o", "a.gguf")
    assert adapter.stdout.startswith("GGUF adapter: a.gguf (llama, 28 tensors, float32, ")
    assert adapter.stdout.endswith("llama-cli -m BASE.gguf --lora a.gguf\n")
    mlx = lorakit_command("export", tiny_adapter, "--to", "mlx", "-o", "mlx")
    assert mlx.stdout.startswith("for mlx-lm: mlx (14 modules, rank 4, scale 2)")
    back = lorakit_command("import", "mlx", "-o", "back")
    assert back.stdout == "adapter: back (from mlx-lm, 14 modules, rank 4: 14)\n", back.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "back", "mlx", "served"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "onnx", "-o", "x"], "'onnx' is not one of 'gguf', 'ollama', 'vllm', 'mlx'"),
        (["--to", "vllm", "-o", "x", "--merged"], "--merged has no effect with --to vllm"),
        (["--to", "gguf", "-o", "x"], "a GGUF file's name ends in .gguf"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    arguments: list[str], words: str, lorakit_command: Command, tiny_adapter: Path, tmp_path: Path
):
    (tmp_path / "mine.txt").write_text("mine")
    result = lorakit_command("export", tiny_adapter, *arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_adapter_is_one_line(
    lorakit_command: Command, tiny_adapter: Path, tmp_path: Path
):
    broken = Path(shutil.copytree(tiny_adapter, tmp_path / "broken"))
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    result = lorakit_command("export", broken, "--to", "gguf", "-o", "a.gguf")
    assert result.returncode == 2
    assert "damaged or cut off" in result.stderr
