"""The usual names of targets mean the one layer that a model has for several of them."""

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import GlmConfig, GlmForCausalLM

from lorakit import LoraConfig, LoraLinear, get_peft_model
from lorakit.errors import InputError

COMPLETE = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def glm() -> GlmForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    return GlmForCausalLM(GlmConfig(**sizes, **heads))


def adapted(model: nn.Module) -> set[str]:
    named = model.get_base_model().named_modules()  # type: ignore[operator]
    return {name.rpartition(".")[2] for name, m in named if isinstance(m, LoraLinear)}


def test_a_gate_and_an_up_projection_in_one_are_adapted_together_and_it_is_said(tmp_path: Path):
    with pytest.warns(UserWarning, match="gate_proj, up_proj are one layer .* gate_up_proj"):
        model = get_peft_model(glm(), LoraConfig(r=2, target_modules=COMPLETE))
    assert adapted(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert set(written) == adapted(model)
    ids = torch.arange(9)[None]
    theirs = peft.PeftModel.from_pretrained(glm(), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, model.eval()(ids).logits)


def test_queries_keys_and_values_in_one_are_adapted_together():
    model = nn.Sequential()
    model.add_module("qkv_proj", nn.Linear(4, 12))
    with pytest.warns(UserWarning, match="qkv_proj"):
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
        )
    assert adapted(model) == {"qkv_proj"}


def test_a_part_alone_is_refused_with_the_layer_that_there_is():
    with pytest.raises(InputError, match=r"'gate_proj' matches no module.*'gate_up_proj'"):
        get_peft_model(glm(), LoraConfig(target_modules=["q_proj", "gate_proj"]))


def test_names_that_match_mean_what_they_say():
    model = nn.Sequential()
    for name in ("gate_proj", "up_proj", "gate_up_proj"):
        model.add_module(name, nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["gate_proj", "up_proj"]))
    assert adapted(model) == {"gate_proj", "up_proj"}
