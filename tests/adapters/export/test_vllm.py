"""The copy for vLLM does what the original does, in PEFT too, and nothing is left out unsaid."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorakit.adapters.export.vllm import export_vllm
from lorakit.errors import InputError
from plain_adapters import KINDS, save_adapter, updates


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_has_the_same_update_in_every_module(kind: str, tiny_model: Path, tmp_path: Path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", **KINDS[kind])
    report = export_vllm(adapter, tmp_path / "served")
    before, after = updates(adapter), updates(tmp_path / "served")
    assert before.keys() == after.keys()
    assert report.figures["modules"] == len(before)
    for path in before:
        torch.testing.assert_close(after[path], before[path], rtol=1e-5, atol=1e-6)
    values = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    largest = {"patterns": 16}.get(kind, 8)
    assert (values["r"], values["lora_alpha"]) == (largest, largest)
    assert not values["use_rslora"]
    assert not values["rank_pattern"]
    assert not values["alpha_pattern"]
    assert isinstance(values["target_modules"], list)
    ranks = {
        t.shape[0]
        for key, t in load_file(tmp_path / "served" / "adapter_model.safetensors").items()
        if "lora_A" in key
    }
    assert ranks == {largest}


@pytest.mark.parametrize("kind", ["rslora", "patterns", "one layer"])
def test_peft_reads_the_copy_and_computes_the_same(kind: str, tiny_model: Path, tmp_path: Path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", **KINDS[kind])
    export_vllm(adapter, tmp_path / "served")
    ids = torch.arange(3, 40)[None]
    logits = []
    for folder in (adapter, tmp_path / "served"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        with torch.no_grad():
            logits.append(peft.PeftModel.from_pretrained(model, folder)(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_the_command_names_base_adapter_and_rank(tiny_model: Path, tmp_path: Path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", r=17, target_modules=["q_proj"])
    report = export_vllm(adapter, tmp_path / "served")
    assert report.command == (
        f"vllm serve {tiny_model} --enable-lora --lora-modules served={tmp_path / 'served'} "
        "--max-lora-rank 32"
    )


@pytest.mark.parametrize(
    ("folder", "value"),
    [
        ("plain name", "'plain name={}'"),
        ("a=b", """'{{"name": "a=b", "path": "{}"}}'"""),  # vLLM cuts at every =
        ("a,b", """'{{"name": "a,b", "path": "{}"}}'"""),  # and takes a comma for JSON
        ("-x", """'{{"name": "-x", "path": "{}"}}'"""),
    ],
)
def test_a_name_that_vllm_would_misread_is_given_as_json(
    folder: str, value: str, tiny_model: Path, tmp_path: Path
):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    report = export_vllm(adapter, tmp_path / folder)
    assert f" --lora-modules {value.format(tmp_path / folder)} --max-lora-rank 8" in report.command


def test_a_gguf_base_is_said_to_be_none_for_vllm(tiny_model: Path, tmp_path: Path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    report = export_vllm(adapter, tmp_path / "served", base="model.gguf")
    (notice,) = report.notices
    assert "model.gguf is a GGUF file: give vLLM the folder or hub id" in notice


def test_the_base_of_an_adapter_made_of_others_is_in_its_record(tiny_model: Path, tmp_path: Path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    record = {"made_by": "resize", "sources": [], "base_model": str(tiny_model)}
    (adapter / "lorakit.json").write_text(json.dumps(record))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert f"vllm serve {tiny_model} " in export_vllm(adapter, tmp_path / "served").command


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules trained whole"),
        ({"bias": "all"}, "trained biases"),
        ({"lora_bias": True}, "a bias of B"),
        ({"trainable_token_indices": [1, 2]}, "trained tokens"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "replicated layers"),
    ],
)
def test_what_vllm_cannot_hold_is_refused_by_name(
    config: dict[str, object], word: str, tiny_model: Path, tmp_path: Path
):
    adapter = save_adapter(
        tiny_model, tmp_path / "adapter", r=2, target_modules=["q_proj"], **config
    )
    with pytest.raises(InputError, match=word) as error:
        export_vllm(adapter, tmp_path / "served")
    assert "lorakit merge" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_rank_beyond_vllms_and_a_value_that_is_not_finite_are_refused(
    tiny_model: Path, tmp_path: Path
):
    large = save_adapter(tiny_model, tmp_path / "large", r=513, target_modules=["q_proj"])
    with pytest.raises(InputError, match="rank 513, and vLLM serves at most 512"):
        export_vllm(large, tmp_path / "served")
    adapter = save_adapter(tiny_model, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = sorted(tensors)[0]
    tensors[key][0, 0] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(InputError, match="NaN or Inf"):
        export_vllm(adapter, tmp_path / "served")
    del tensors[key]
    save_file({k: torch.ones_like(t) for k, t in tensors.items()}, weights)
    with pytest.raises(InputError, match="its factor A is missing"):
        export_vllm(adapter, tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_an_output_that_exists_is_left_alone(tiny_model: Path, tmp_path: Path):
    adapter = save_adapter(tiny_model, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        export_vllm(adapter, tmp_path / "served")
    assert [p.name for p in (tmp_path / "served").iterdir()] == ["mine.txt"]
