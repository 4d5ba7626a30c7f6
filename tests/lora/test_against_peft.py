"""PEFT 0.21 is the reference: the same weights give the same numbers, and the same files."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from families import output, to_peft, wrap
from lorakit import LoraConfig, PeftModel, get_peft_model
from lorakit.lora.checkpoint import adapter_parameters
from matrix import few

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention-minimal": ("llama", {"target_modules": "attention-minimal"}),
    "attention": ("llama", {"target_modules": "attention"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "default targets": ("llama", {}),
    "names": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "expression": ("llama", {"target_modules": r".*\.1\.self_attn\.(q|o)_proj"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True, "r": 5}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.v_proj": 5},
            "alpha_pattern": {"q_proj": 32},
        },
    ),
    "bias lora_only": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias all": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "bias none": ("llama", {"target_modules": ["q_proj"], "bias": "none"}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "a layer by pattern": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
    "exclusion": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}),
    "exclusion by expression": (
        "llama",
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
    ),
    "gpt2 attention": ("gpt2", {"target_modules": "attention"}),
    "gpt2 all-linear": ("gpt2", {"target_modules": "all-linear"}),
    "gpt2 embedding": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "dora and rslora": (
        "llama",
        {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    ),
    "dora and patterns": (
        "llama",
        {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "rank_pattern": {"o_proj": 3}},
    ),
    "gpt2 dora": ("gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True}),
    "lora bias": ("llama", {"target_modules": ["q_proj", "down_proj"], "lora_bias": True}),
    "convolutions": ("conv", {"target_modules": ["one", "two", "three"]}),
    "convolutions with rslora": ("conv", {"target_modules": ["one", "two"], "use_rslora": True}),
    "convolutions with dora": ("conv", {"target_modules": ["one", "two"], "use_dora": True}),
    "convolutions with bias": ("conv", {"target_modules": ["one", "two"], "lora_bias": True}),
    "convolutions with patterns": (
        "conv",
        {"target_modules": ["one", "two", "three"], "rank_pattern": {"two": 2}},
    ),
    "experts": ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "experts alone": (
        "gpt-oss",
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts of one kind": (
        "gpt-oss",
        {"target_modules": ["q_proj"], "target_parameters": ["1.mlp.experts.down_proj"]},
    ),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}),
    "tokens by name": (
        "llama",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 3]}},
    ),
    "tokens of a tied embedding": (
        "tied",
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
    ),
    "bert attention": ("bert", {"target_modules": "attention"}),
    "bert all-linear": ("bert", {"target_modules": "all-linear"}),
}
every_case = pytest.mark.parametrize(("family", "fields"), CASES.values(), ids=CASES.keys())
some_cases = pytest.mark.parametrize(
    ("family", "fields"),
    few(
        CASES,
        *("all-linear", "embedding", "head", "patterns", "bias lora_only", "bias all"),
        *("modules to save", "gpt2 attention", "dora and rslora", "lora bias"),
        *("convolutions with dora", "experts", "tokens by name", "tokens of a tied embedding"),
    ),
)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a - b).abs().max().item() < 1e-10


@every_case
def test_the_outputs_are_those_of_peft_plain_merged_and_disabled(
    build, ids, tmp_path: Path, family: str, fields: dict[str, Any]
):
    base = build(family)
    ours = wrap(copy.deepcopy(base), **fields)
    theirs = to_peft(ours, base, tmp_path)
    expected = output(theirs, ids)
    assert close(output(ours, ids), expected)
    assert not close(expected, output(base, ids))
    with ours.disable_adapter():
        trained_biases = fields.get("bias", "none") != "none"
        assert trained_biases or close(output(ours, ids), output(base, ids))
    ours.merge_adapter()
    assert close(output(ours, ids), expected)
    ours.unmerge_adapter()
    merged = ours.merge_and_unload()
    assert close(output(merged, ids), expected)
    assert merged.state_dict().keys() == base.state_dict().keys()
    if hasattr(base, "config") and (
        merged.config.tie_word_embeddings != base.config.tie_word_embeddings
    ):
        return  # PEFT changes the head along with the embedding that it is tied to
    theirs_merged = dict(theirs.merge_and_unload().named_parameters())
    for name, parameter in merged.named_parameters():
        assert close(parameter, theirs_merged[name]), name


@some_cases
def test_in_float32_the_difference_is_rounding(
    build, ids, tmp_path: Path, family: str, fields: dict[str, Any]
):
    base = build(family).float()
    ours = wrap(copy.deepcopy(base), **fields)
    expected = output(to_peft(ours, base, tmp_path).float(), ids)
    allowed = 1e-5 * max(1.0, expected.abs().max().item())
    assert (output(ours, ids) - expected).abs().max() < allowed
    assert (output(ours.merge_and_unload(), ids) - expected).abs().max() < allowed


@every_case
def test_the_gradients_are_those_of_peft(
    build, ids, tmp_path: Path, family: str, fields: dict[str, Any]
):
    base = build(family)
    ours = wrap(copy.deepcopy(base), **fields)
    theirs = to_peft(ours, base, tmp_path, trainable=True)
    for model in (ours, theirs):
        model.train()
        for module in model.modules():  # the families' own dropout would draw differently
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        output(model, ids).square().sum().backward()
    bias = fields.get("bias", "none")
    found = adapter_parameters(ours.get_base_model(), "default", bias)
    expected = {
        name.replace(".default", "")
        .replace(".modules_to_save", "")
        .replace("_vector.weight", "_vector"): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        if expected[name] is None:  # BERT's pooler has no part in the hidden states
            assert parameter.grad is None
            continue
        scale = expected[name].abs().max() + 1
        assert (parameter.grad - expected[name]).abs().max() / scale < 1e-10, name
    trained = {p for p in ours.parameters() if p.requires_grad}
    assert trained == set(found.values())


@some_cases
def test_files_have_the_keys_and_the_configuration_that_peft_writes(
    build, ids, tmp_path: Path, family: str, fields: dict[str, Any]
):
    base = build(family)
    ours = wrap(copy.deepcopy(base), **fields)
    theirs = to_peft(ours, base, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    here, there = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")
    )
    # PEFT stores a copy of a targeted embedding or head of the base; it is the base's own.
    extra = {k for k in there if k.endswith(".base_layer.weight")}
    assert here.keys() == there.keys() - extra
    for key, tensor in here.items():
        assert torch.equal(tensor, there[key]), key

    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    assert close(output(back, ids), output(theirs, ids))
    back.save_pretrained(tmp_path / "back")
    before, after = (
        json.loads((tmp_path / name / "adapter_config.json").read_text())
        for name in ("theirs", "back")
    )
    for name, value in before.items():
        same = sorted(value) if isinstance(value, list) else value
        mine = sorted(after[name]) if isinstance(after[name], list) else after[name]
        assert mine == same, name


def test_several_adapters_switched_added_up_and_saved_in_subfolders(build, ids, tmp_path: Path):
    base = build()
    ours = wrap(copy.deepcopy(base), target_modules=["q_proj"], r=3)
    torch.manual_seed(9)
    ours.add_adapter("other", LoraConfig(target_modules="all-linear", r=5, init_lora_weights=False))
    assert ours.active_adapters == ["default"]
    theirs = to_peft(ours, base, tmp_path)
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    alone = {}
    for name in ("default", "other"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        alone[name] = output(ours, ids)
        assert close(alone[name], output(theirs, ids))
    ours.set_adapter(["default", "other"])
    theirs.base_model.set_adapter(["default", "other"])
    together = output(ours, ids)
    assert close(together, output(theirs, ids))
    ours.merge_adapter()
    assert close(output(ours, ids), together)


def test_a_row_each_is_what_peft_gives_for_a_mixed_batch(build, ids, tmp_path: Path):
    base = build()
    ours = wrap(copy.deepcopy(base), target_modules=["q_proj", "embed_tokens"], r=3, lora_alpha=5)
    torch.manual_seed(9)
    ours.add_adapter("other", LoraConfig(target_modules=["q_proj"], r=5, init_lora_weights=False))
    theirs = to_peft(ours, base, tmp_path)
    names = ["other", "__base__", "default"]
    found = output(ours, ids, adapter_names=names)
    assert close(found, output(theirs, ids, adapter_names=names))


def test_a_script_runs_with_one_import_changed(build):
    fields: dict[str, Any] = {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj", "k_proj", "o_proj"],
        "lora_dropout": 0.1,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    ours = get_peft_model(build(), LoraConfig(**fields))
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**fields))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    from_theirs = LoraConfig(**{**fields, "task_type": peft.TaskType.CAUSAL_LM})
    assert from_theirs.task_type == "CAUSAL_LM"


def test_the_trainable_parameters_are_printed_in_the_familiar_form(build, capsys):
    ours = wrap(build(), target_modules=["q_proj"])
    ours.print_trainable_parameters()
    mine = capsys.readouterr().out
    peft.get_peft_model(
        build(), peft.LoraConfig(target_modules=["q_proj"])
    ).print_trainable_parameters()
    assert mine == capsys.readouterr().out
