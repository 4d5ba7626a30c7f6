"""`lorakit convert` writes what plain transformers loads, with the same values and tokens."""

import inspect
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GlmForCausalLM

import lorakit
from chatglm_folders import config, tensors, write_original
from command import run_lorakit
from lorakit.errors import InputError
from lorakit.models.layouts.convert import convert
from matrix import few
from plain_chatglm import PlainChatGLM
from tiny import save_tiny_model


def said(folder: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, token numbers and weights of the model in `folder`, by transformers alone."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ids = AutoTokenizer.from_pretrained(folder)("低秩 rank", return_tensors="pt").input_ids
    return model.float()(ids).logits.detach(), ids, model.state_dict()


@pytest.mark.parametrize(
    ("form", "shards"), few(list(product(["safetensors", "bin"], [1, 3])), ("bin", 3))
)
def test_plain_transformers_loads_what_was_written(tmp_path: Path, form: str, shards: int):
    source = write_original(tmp_path / "original", form, torch.float16, shards=shards)
    (source / "MODEL_LICENSE").write_text("terms")
    result = run_lorakit(tmp_path, "convert", source, "-o", "native")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ChatGLM3 as transformers' GLM: native (25 tensors, ")
    assert "float16" in result.stdout
    native = tmp_path / "native"
    files = {path.name for path in native.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "MODEL_LICENSE"} <= files
    assert len([name for name in files if name.endswith(".safetensors")]) == shards
    assert not [name for name in files if name.endswith((".py", ".bin"))]
    logits, ids, state = said(native)
    expected = PlainChatGLM(config(), tensors(config(), torch.float16))(ids)[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    direct, tokenizer = lorakit.load_model(str(source), "float32")
    for name, tensor in direct.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert tokenizer("低秩 rank", return_tensors="pt").input_ids.tolist() == ids.tolist()


@pytest.mark.exhaustive
def test_a_process_that_knows_nothing_of_lorakit_loads_what_was_written(tmp_path: Path):
    convert(write_original(tmp_path / "original"), tmp_path / "native")
    code = (
        "from __future__ import annotations\nimport sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"{inspect.getsource(said)}\n"
        "torch.save(said('native'), 'said')\nassert 'lorakit' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    logits, ids, state = torch.load(tmp_path / "said")
    expected = said(tmp_path / "native")
    assert torch.equal(logits, expected[0])
    assert torch.equal(ids, expected[1])
    assert state.keys() == expected[2].keys()


def test_every_value_keeps_its_dtype_and_the_model_its_class(tmp_path: Path):
    source = write_original(tmp_path / "original", dtype=torch.bfloat16)
    report = convert(source, tmp_path / "native")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert (type(model), model.dtype, report.dtype) == (GlmForCausalLM, torch.bfloat16, "bfloat16")
    assert report.parameters == sum(p.numel() for p in model.parameters())
    values = json.loads((tmp_path / "native" / "config.json").read_text())
    assert (values["model_type"], values["architectures"]) == ("glm", ["GlmForCausalLM"])
    assert "auto_map" not in values
    index = json.loads((tmp_path / "native" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "native" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_the_stops_and_the_template_go_with_the_model(tmp_path: Path):
    convert(write_original(tmp_path / "original"), tmp_path / "native")
    settings = GenerationConfig.from_pretrained(tmp_path / "native")
    assert (settings.eos_token_id, settings.pad_token_id) == ([2, 706, 708], 0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "[gMASK]sop<|user|>\n hi<|assistant|>"
    assert lorakit.load_model(str(tmp_path / "native"))[0].generation_config.eos_token_id == [
        *(2, 706, 708)
    ]


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path: Path):
    native = save_tiny_model(tmp_path / "llama")
    for arguments, words in (
        ((str(native), "-o", "out"), "is not in ChatGLM's original layout"),
        (("nowhere", "-o", "out"), "there is no alias or folder 'nowhere'"),
    ):
        result = run_lorakit(tmp_path, "convert", *arguments)
        assert result.returncode == 2
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
    source = write_original(tmp_path / "original", form="bin")
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(InputError, match="is missing"):
        convert(source, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(InputError, match="already exists"):
        convert(source, tmp_path / "full")
    assert {path.name for path in tmp_path.iterdir()} == {"llama", "original", "full"}
