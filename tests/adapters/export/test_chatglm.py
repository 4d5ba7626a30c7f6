"""The copy under ChatGLM's own names does in the original model what the adapter does in GLM."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import lorakit
from chatglm_folders import config, write_original
from chatglm_modules import OriginalModules
from command import run_lorakit
from lorakit.adapters.export.chatglm import export_chatglm
from lorakit.errors import InputError
from matrix import few
from plain_adapters import save_adapter
from plain_chatglm import PlainChatGLM

ATTENTION = ["q_proj", "v_proj", "k_proj", "o_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8},
    "two of three": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 8},
    "keys alone": {"target_modules": ["k_proj"], "r": 2, "lora_alpha": 3, "use_rslora": True},
    "all linear": {"target_modules": "all-linear", "r": 4, "lora_alpha": 8},
    "other ranks and alphas": {
        "target_modules": [*ATTENTION, "gate_up_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"v_proj": 1, "layers.1.self_attn.o_proj": 6},
        "alpha_pattern": {"q_proj": 5, "gate_up_proj": 3},
    },
    "one layer": {"target_modules": ["q_proj", "o_proj"], "r": 2, "layers_to_transform": [1]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 2},
    "pissa": {"target_modules": ["q_proj", "k_proj"], "r": 2, "init_lora_weights": "pissa"},
}


@pytest.fixture(scope="module")
def chatglm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_original(tmp_path_factory.mktemp("original") / "chatglm3-6b")


@pytest.mark.parametrize("kind", few(list(KINDS), "other ranks and alphas", "pissa"))
def test_peft_on_the_original_modules_computes_the_same(kind: str, chatglm: Path, tmp_path: Path):
    adapter = save_adapter(chatglm, tmp_path / "adapter", task_type="CAUSAL_LM", **KINDS[kind])
    report = export_chatglm(adapter, tmp_path / "named")
    model, _ = lorakit.load_model(str(chatglm), "float32")
    ids = torch.arange(3, 60)[None] * 11 % 700
    with torch.no_grad():
        bare = model(ids).logits
        expected = lorakit.PeftModel.from_pretrained(model, str(adapter)).eval()(ids).logits
    adapted = peft.PeftModel.from_pretrained(OriginalModules(), tmp_path / "named")
    layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == report.figures["modules"] == sum(report.figures["ranks"].values())
    merged = adapted.merge_and_unload().state_dict()
    found = PlainChatGLM(config(), merged)(ids)[0]
    assert (expected - bare).abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_joined_factors_are_the_very_values_that_were_trained(chatglm: Path, tmp_path: Path):
    adapter = save_adapter(chatglm, tmp_path / "adapter", **KINDS["attention"])
    export_chatglm(adapter, tmp_path / "named")
    before = load_file(adapter / "adapter_model.safetensors")
    after = load_file(tmp_path / "named" / "adapter_model.safetensors")
    begin = "base_model.model.transformer.encoder.layers.1.self_attention."
    old = "base_model.model.model.layers.1.self_attn."
    A, B = (after[f"{begin}query_key_value.lora_{one}.weight"] for one in "AB")
    assert (A.shape, B.shape) == ((12, 32), (64, 12))
    row = 0
    for number, part in enumerate(("q_proj", "k_proj", "v_proj")):
        columns = slice(4 * number, 4 * number + 4)
        own = before[f"{old}{part}.lora_B.weight"]
        assert torch.equal(A[columns], before[f"{old}{part}.lora_A.weight"])
        assert torch.equal(B[row : row + len(own), columns], own)
        row += len(own)
    assert math.isclose(B.count_nonzero(), 64 * 4)  # nothing beside the diagonal
    for one in "AB":
        assert torch.equal(
            after[f"{begin}dense.lora_{one}.weight"], before[f"{old}o_proj.lora_{one}.weight"]
        )
    values = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert sorted(values["target_modules"]) == ["dense", "query_key_value"]
    assert values["base_model_name_or_path"] == str(chatglm)
    scalings = {
        name: alpha / values["rank_pattern"][name]
        for name, alpha in values["alpha_pattern"].items()
    }
    assert {*scalings.values(), values["lora_alpha"] / values["r"]} == {2.0}


def test_the_command_line_says_what_was_written(chatglm: Path, tmp_path: Path):
    save_adapter(chatglm, tmp_path / "adapter", **KINDS["attention"])
    result = run_lorakit(tmp_path, "export", "adapter", "--to", "chatglm", "-o", "named")
    assert result.returncode == 0, result.stderr
    first, last = result.stdout.strip().splitlines()
    assert first == "for ChatGLM's original code: named (4 modules: 2 of rank 4, 2 of rank 12)"
    assert last.startswith("PeftModel.from_pretrained(AutoModel.from_pretrained(")


def test_what_the_original_code_cannot_hold_is_refused(
    chatglm: Path, tiny_model: Path, tmp_path: Path
):
    def refusal(folder: Path, base: str | None = None) -> str:
        with pytest.raises(InputError) as error:
            export_chatglm(folder, tmp_path / "out", base=base)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    llama = save_adapter(tiny_model, tmp_path / "llama", target_modules=["q_proj"], r=2)
    assert "a model of the kind llama" in refusal(llama)
    assert "has an update of shape" in refusal(
        save_adapter(chatglm, tmp_path / "own", target_modules=["q_proj"], r=2),
        str(write_original(tmp_path / "wide", values=config(kv_channels=16))),
    )
    up = save_adapter(tiny_model, tmp_path / "up", target_modules=["up_proj"], r=2)
    assert "GLM has no module model.layers.0.mlp.up_proj" in refusal(up, str(chatglm))
    dora = save_adapter(chatglm, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    assert "DoRA" in refusal(dora)
