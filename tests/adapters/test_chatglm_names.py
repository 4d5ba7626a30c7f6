"""An adapter that PEFT trained on ChatGLM's original code does the same on transformers' GLM."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from chatglm_folders import config, write_original
from chatglm_modules import OriginalModules
from command import run_lorakit
from lorakit.adapters.adapter_files import read_files
from lorakit.adapters.export.chatglm import export_chatglm
from lorakit.adapters.foreign import import_adapter
from lorakit.errors import InputError
from lorakit.models.layouts.convert import convert
from matrix import few
from plain_adapters import save_adapter
from plain_chatglm import PlainChatGLM

LAYER = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
KINDS: dict[str, dict[str, Any]] = {
    "queries, keys and values": {"target_modules": ["query_key_value"]},
    "all of a layer": {"target_modules": LAYER, "lora_alpha": 6, "use_rslora": True},
    "other ranks and alphas": {
        "target_modules": LAYER,
        "rank_pattern": {"query_key_value": 6, "layers.1.self_attention.dense": 2},
        "alpha_pattern": {"layers.0.self_attention.query_key_value": 11},
    },
    "one layer": {"target_modules": ["query_key_value", "dense"], "layers_to_transform": [1]},
    "lengths": {"target_modules": LAYER, "use_dora": True},
    "biases": {"target_modules": LAYER, "bias": "lora_only"},
    "biases of B": {"target_modules": ["query_key_value"], "lora_bias": True},
    "modules whole": {
        "target_modules": ["dense"],
        "modules_to_save": ["query_key_value", "output_layer", "dense_4h_to_h"],
    },
    "embedding": {"target_modules": ["word_embeddings", "query_key_value"]},
    "tokens": {
        "target_modules": ["query_key_value"],
        "trainable_token_indices": {"word_embeddings": [5, 9]},
    },
}


@pytest.fixture(scope="module")
def chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tmp_path_factory.mktemp("original") / "chatglm3-6b")


def trained(folder: Path, base: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Writes PEFT's adapter, with values as after a training; returns the merged tensors."""
    torch.manual_seed(3)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    adapted = peft.get_peft_model(OriginalModules(), peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    values = json.loads((folder / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize("kind", few(list(KINDS), "other ranks and alphas", "modules whole"))
def test_the_imported_adapter_gives_the_logits_of_the_original(
    kind: str, chatglm: Path, tmp_path: Path
):
    merged = trained(tmp_path / "theirs", chatglm, **KINDS[kind])
    report = import_adapter(tmp_path / "theirs", tmp_path / "ours")
    ids = torch.arange(3, 60)[None] * 11 % 700
    model, _ = lorakit.load_model(str(chatglm), "float32")
    with torch.no_grad():
        bare = model(ids).logits
        found = lorakit.PeftModel.from_pretrained(model, str(tmp_path / "ours")).eval()
        expected = PlainChatGLM(config(), merged)(ids)[0]
        assert (expected - bare).abs().max() > 0.05
        torch.testing.assert_close(found(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert report.modules == len(found.targeted_module_names)


def test_factors_are_the_very_values_that_were_trained(chatglm: Path, tmp_path: Path):
    trained(tmp_path / "theirs", chatglm, target_modules=["query_key_value"])
    import_adapter(tmp_path / "theirs", tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    after = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    old = "base_model.model.transformer.encoder.layers.1.self_attention.query_key_value.lora_"
    new = "base_model.model.model.layers.1.self_attn."
    rows = []
    for part in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(after[f"{new}{part}.lora_A.weight"], before[f"{old}A.weight"])
        rows.append(after[f"{new}{part}.lora_B.weight"])
    assert [len(B) for B in rows] == [32, 16, 16]
    assert torch.equal(torch.cat(rows), before[f"{old}B.weight"])
    values = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert sorted(values["target_modules"]) == ["k_proj", "q_proj", "v_proj"]
    assert (values["r"], values["lora_alpha"], values["rank_pattern"]) == (4, 8, {})


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj"], ["q_proj"]])
def test_what_was_exported_for_the_original_code_comes_back_as_it_was(
    targets: list[str], chatglm: Path, tmp_path: Path
):
    adapter = save_adapter(chatglm, tmp_path / "adapter", target_modules=targets, r=3, lora_alpha=9)
    export_chatglm(adapter, tmp_path / "named")
    import_adapter(tmp_path / "named", tmp_path / "back")
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    values = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"]) == (3, 9)


def test_an_adapter_that_was_not_trained_yet_keeps_its_rank(chatglm: Path, tmp_path: Path):
    fresh = peft.get_peft_model(
        OriginalModules(), peft.LoraConfig(r=4, target_modules=["query_key_value"])
    )
    fresh.save_pretrained(tmp_path / "theirs")
    report = import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(chatglm))
    assert report.ranks == {4: 6}


def test_a_converted_base_will_do_and_the_command_says_what_was_written(
    chatglm: Path, tmp_path: Path
):
    trained(tmp_path / "theirs", chatglm, target_modules=["query_key_value"])
    convert(chatglm, tmp_path / "native")
    done = run_lorakit(tmp_path, "import", "theirs", "-o", "ours", "--base", "native")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "adapter: ours (from PEFT on ChatGLM's code, 6 modules, rank 4: 6)\n"
    assert read_files(tmp_path / "ours").base_model == "native"


def test_every_verb_says_how_such_an_adapter_is_imported(chatglm: Path, tmp_path: Path):
    trained(tmp_path / "theirs", chatglm, target_modules=["query_key_value"])
    with pytest.raises(InputError, match=r"lorakit import .*theirs -o DIR, and use DIR"):
        read_files(tmp_path / "theirs")


def test_what_cannot_be_the_same_is_refused_in_a_line(
    chatglm: Path, tiny_model: Path, tmp_path: Path
):
    def refusal(source: Path, **options: Any) -> str:
        with pytest.raises(InputError) as error:
            import_adapter(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    own = tmp_path / "own"
    trained(own, chatglm, target_modules=["query_key_value"], init_lora_weights="pissa")
    assert "starts from the base's weights (pissa)" in refusal(own)
    plain = tmp_path / "plain"
    trained(plain, chatglm, target_modules=["query_key_value"])
    assert "a model of the kind llama: give --base" in refusal(plain, base=str(tiny_model))
    wide = write_original(tmp_path / "wide", values=config(kv_channels=16))
    assert "query_key_value.lora_B.weight has 64 rows, and the base's 128" in refusal(
        plain, base=str(wide)
    )
    assert "--alpha" in refusal(plain, alpha=3.0)
    weights = load_file(plain / "adapter_model.safetensors")
    prefix = "base_model.model.transformer.encoder.layers.0.self_attention"
    lacking = {k: t for k, t in weights.items() if k != f"{prefix}.query_key_value.lora_B.weight"}
    save_file(lacking, plain / "adapter_model.safetensors")
    assert "lacks base_model.model.model.layers.0.self_attn.k_proj.lora_B" in refusal(plain)
    save_file(
        {**weights, f"{prefix}.core.lora_A.weight": torch.ones(1, 1)},
        plain / "adapter_model.safetensors",
    )
    assert "core.lora_A.weight is not part of an adapter on ChatGLM2" in refusal(plain)
    native = save_adapter(chatglm, tmp_path / "native", target_modules=["q_proj"])
    assert "nothing to import" in refusal(native)
