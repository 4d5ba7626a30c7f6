"""The presets find the projections of every family, by whatever names they go."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from families import wrap
from lorakit import LoraConfig
from lorakit.errors import InputError
from lorakit.lora.targets import resolve_targets, written_targets

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
        written = LoraConfig(target_modules=written_targets(names, model))
        assert resolve_targets(model, written) == names


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_mean_no_adapted_module_are_named(build, field):
    with pytest.warns(RuntimeWarning, match=rf"{field}: \['v_proj'\] did not match"):
        wrap(build(), target_modules=["q_proj"], **{field: {"q_proj": 4, "v_proj": 4}})


def test_an_exclusion_that_excludes_nothing_is_named(build):
    with pytest.warns(UserWarning, match="no modules were excluded"):
        wrap(build(), target_modules=["q_proj"], exclude_modules=["lm_haed"])


def test_an_error_says_how_many_modules_each_target_matches(build):
    with pytest.raises(InputError, match="Modules matched: q_proj 2, q_porj 0, down_proj 2"):
        wrap(build(), target_modules=["q_proj", "q_porj", "down_proj"])


def test_many_names_are_written_as_the_endings_that_mean_the_same(build):
    names = [name for name, m in build().named_modules() if name.endswith("_proj")]
    assert len(names) * 2 >= 20
    model = wrap(build(), target_modules=[*names, *names])
    assert len(model.peft_config["default"].target_modules) == 7
    assert sorted(model.targeted_module_names) == sorted(names)
