"""PEFT's low-level functions: adapters in a plain model, and state dictionaries."""

import copy

import peft
import pytest
import torch
from torch import nn

from families import output, wrap
from lorakit import (
    LoraConfig,
    LoraModel,
    get_base_model_state_dict,
    get_layer_status,
    get_model_status,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from lorakit.errors import InputError

RANDOM = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)


def test_an_injected_model_keeps_its_class_and_gives_the_keys_that_peft_gives(build, ids):
    base = build()
    kind = type(base)
    model = inject_adapter_in_model(RANDOM, base)
    assert model is base
    assert type(model) is kind
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), build())
    state = get_peft_model_state_dict(model)
    assert state.keys() == peft.get_peft_model_state_dict(theirs).keys()
    result = peft.set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys
    torch.testing.assert_close(output(theirs.double(), ids), output(model, ids), rtol=0, atol=1e-10)


def test_state_goes_from_one_model_to_the_other(build, ids):
    source = wrap(build(), target_modules=["q_proj"])
    for target in (wrap(build(), seed=9, target_modules=["q_proj"]), build()):
        if isinstance(target, LoraModel):
            state = get_peft_model_state_dict(source)
        else:
            inject_adapter_in_model(RANDOM, target, low_cpu_mem_usage=True)
            assert any(p.is_meta for p in target.parameters())
            prefix = "base_model.model."
            state = {
                key.removeprefix(prefix): tensor
                for key, tensor in get_peft_model_state_dict(source).items()
            }
        assert set_peft_model_state_dict(target, state) == ([], [])
        assert torch.equal(output(target, ids), output(source, ids))
    first, *_ = state
    short = {key: tensor for key, tensor in state.items() if key != first}
    result = set_peft_model_state_dict(target, {**short, "another": torch.zeros(1)})
    assert result == ([first], ["another"])
    with pytest.raises(InputError, match="shape"):
        set_peft_model_state_dict(target, {first: torch.zeros(1)})
    result = set_peft_model_state_dict(
        target, {first: torch.zeros(1)}, ignore_mismatched_sizes=True
    )
    assert first in result.missing_keys


def test_targets_are_taken_from_a_state(build):
    state = get_peft_model_state_dict(inject_adapter_in_model(RANDOM, build()))
    model = inject_adapter_in_model(
        LoraConfig(target_modules=["v_proj"]), build(), state_dict=state
    )
    assert get_peft_model_state_dict(model).keys() == state.keys()
    config = LoraConfig(target_modules=[], target_parameters=["q_proj.weight"])
    with pytest.raises(InputError, match="cannot be told from a state_dict"):
        inject_adapter_in_model(config, build(), state_dict=state)


def test_the_bases_own_state_is_that_of_the_plain_model(build, ids):
    plain = build()
    fields = {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}
    model = wrap(copy.deepcopy(plain), target_modules=["q_proj"], **fields)
    state = get_base_model_state_dict(model)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    set_base_model_state_dict(model, zeros)
    with model.disable_adapter():
        assert not output(model, ids).any()
    with pytest.raises(RuntimeError, match="Missing key"):
        set_base_model_state_dict(model, {})
    assert set_base_model_state_dict(
        model, {"x": torch.zeros(1)}, strict=False
    ).unexpected_keys == ["x"]


def test_status_is_told_of_any_model_that_holds_adapters(build):
    model = inject_adapter_in_model(RANDOM, build())
    holder = nn.ModuleDict({"inside": model})
    assert len(get_layer_status(holder)) == len(get_layer_status(model)) == 2
    assert get_model_status(holder).available_adapters == ["default"]
    with pytest.raises(InputError, match="No adapter layers found"):
        get_layer_status(build())
    with pytest.raises(InputError, match="has no adapters"):
        get_peft_model_state_dict(build())
