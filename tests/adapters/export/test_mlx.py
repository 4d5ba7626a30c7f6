"""mlx-lm's files hold the same update, and come back as they were."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gguf_models import save_family
from lorakit.adapters.export.mlx import export_mlx
from lorakit.adapters.foreign import import_adapter
from lorakit.errors import InputError
from plain_adapters import KINDS, save_adapter, updates


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_mlx_lms_and_hold_the_same_update(kind: str, tiny_model: Path, tmp_path: Path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", **KINDS[kind])
    report = export_mlx(adapter, tmp_path / "mlx")
    values = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    expected = updates(adapter)
    assert {key.rpartition(".")[0] for key in tensors} == expected.keys()
    parameters = values["lora_parameters"]
    assert report.figures["r"] == parameters["rank"]
    for path, update in expected.items():
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        assert (a.shape[1], b.shape[0]) == (parameters["rank"],) * 2
        # mlx-lm: scale * (x @ lora_a) @ lora_b
        found = (parameters["scale"] * a @ b).T
        torch.testing.assert_close(found, update, rtol=1e-5, atol=1e-6)
        assert path.split(".", 3)[3] in parameters["keys"]
        assert int(path.split(".")[2]) >= 2 - values["num_layers"]
    assert values["fine_tune_type"] == "lora"


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_out_comes_back(kind: str, tiny_model: Path, tmp_path: Path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", **KINDS[kind])
    export_mlx(adapter, tmp_path / "mlx")
    report = import_adapter(tmp_path / "mlx", tmp_path / "back")
    assert report.tool == "mlx-lm"
    before, after = updates(adapter), updates(tmp_path / "back")
    assert before.keys() == after.keys()
    for path in before:
        torch.testing.assert_close(after[path], before[path], rtol=1e-5, atol=1e-6)


def test_a_base_with_other_names_and_a_tied_embedding_are_refused(tmp_path: Path):
    gpt2 = save_family(tmp_path / "gpt2", "gpt2")
    adapter = save_adapter(gpt2, tmp_path / "a", r=2)
    with pytest.raises(InputError, match="gpt2 model, whose modules mlx-lm may name otherwise"):
        export_mlx(adapter, tmp_path / "mlx")
    tied = save_family(tmp_path / "tied", "llama, tied")
    adapter = save_adapter(tied, tmp_path / "b", r=2, target_modules=["embed_tokens"])
    with pytest.raises(InputError, match="one weight as embedding and as head"):
        export_mlx(adapter, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_dora_is_refused(tiny_model: Path, tmp_path: Path):
    adapter = save_adapter(
        tiny_model, tmp_path / "adapter", r=2, target_modules=["q_proj"], use_dora=True
    )
    with pytest.raises(InputError, match="DoRA"):
        export_mlx(adapter, tmp_path / "mlx")
