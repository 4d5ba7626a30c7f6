"""The presets find the projections of every family, by whatever names they go."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lorakit import LoraConfig
from lorakit.lora.targets import resolve_targets, suffixes_for

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "pad_token_id": 0,
}
SELF = {"q_proj", "k_proj", "v_proj", "o_proj"}

# family: (configuration, names under attention-minimal, names under attention)
FAMILIES = {
    "llama": (SMALL, {"q_proj", "v_proj"}, SELF),
    "qwen3": (SMALL | {"head_dim": 8}, {"q_proj", "v_proj"}, SELF),
    "gemma2": (SMALL | {"head_dim": 8}, {"q_proj", "v_proj"}, SELF),
    "glm": (SMALL | {"head_dim": 8}, {"q_proj", "v_proj"}, SELF),
    "phi3": (SMALL, {"qkv_proj"}, {"qkv_proj", "o_proj"}),
    "gpt_neox": (SMALL, {"query_key_value"}, {"query_key_value", "dense"}),
    "falcon": (SMALL, {"query_key_value"}, {"query_key_value", "dense"}),
    "bloom": (
        {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50},
        {"query_key_value"},
        {"query_key_value", "dense"},
    ),
    "gpt2": (
        {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50},
        {"c_attn"},
        {"c_attn", "c_proj"},
    ),
    "opt": (
        SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32},
        {"q_proj", "v_proj"},
        {"q_proj", "k_proj", "v_proj", "out_proj"},
    ),
}
ENCODERS = {
    "bert": (SMALL, {"query", "value"}, {"query", "key", "value", "dense"}),
    "roberta": (SMALL, {"query", "value"}, {"query", "key", "value", "dense"}),
    "distilbert": (
        {"dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4, "vocab_size": 50},
        {"q_lin", "v_lin"},
        {"q_lin", "k_lin", "v_lin", "out_lin"},
    ),
    "t5": (
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 50},
        {"q", "v"},
        {"q", "k", "v", "o"},
    ),
}


def leaves(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS])
def test_presets_find_the_projections_of(family: str):
    fields, minimal, attention = {**FAMILIES, **ENCODERS}[family]
    config = AutoConfig.for_model(family, **fields)
    kind = AutoModelForCausalLM if family in FAMILIES else AutoModel
    with torch.device("meta"):
        model = kind.from_config(config)
    found = {
        preset: resolve_targets(model, LoraConfig(target_modules=preset))
        for preset in ("attention-minimal", "attention", "all-linear")
    }
    assert leaves(found["attention-minimal"]) == minimal
    assert leaves(found["attention"]) == attention
    assert set(found["attention-minimal"]) <= set(found["attention"]) <= set(found["all-linear"])
    assert len(found["all-linear"]) > len(found["attention"])
    head = getattr(model, "get_output_embeddings", lambda: None)()
    assert all(model.get_submodule(name) is not head for name in found["all-linear"])
    for names in found.values():  # what is written to the file means the same modules again
        written = LoraConfig(target_modules=suffixes_for(names, model))
        assert resolve_targets(model, written) == names
