"""Adapters that start from data, from a quantised weight, or from minor directions."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from families import output, wrap
from lorakit import (
    CordaConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from lorakit.errors import InputError

TARGETS = ["q_proj", "v_proj"]


def batches(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": (ids + i) % 40, "labels": (ids + i) % 40} for i in range(3)]


def prepare(how: str, model: nn.Module, config: LoraConfig, ids: torch.Tensor) -> None:
    """Runs what an initialisation from data needs before the adapter is made."""
    if how == "corda":
        preprocess_corda(model, config, lambda: [model(**batch) for batch in batches(ids)])
    else:
        preprocess_loraga(
            model, config, lambda: [model(**batch).loss.backward() for batch in batches(ids)]
        )


def data_config(how: str, **fields: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=how, **fields)


@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_a_start_from_data_changes_nothing_and_goes_through_files(build, ids, tmp_path, how):
    base = build()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = output(base, ids)
    config = data_config(how)
    prepare(how, base, config, ids)
    assert all(p.grad is None for p in base.parameters())
    model = get_peft_model(base, config)
    torch.testing.assert_close(output(model, ids), expected, rtol=0, atol=1e-12)
    layer = model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_B["default"].weight.abs().sum() > 0
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(3)
    trained = output(model, ids)
    model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(build(), tmp_path / "own")
    torch.testing.assert_close(output(again, ids), trained, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion="yes")
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "plain").double()
    torch.testing.assert_close(output(theirs, ids), trained, rtol=0, atol=1e-10)
    bare = model.unload().state_dict()
    assert all(torch.equal(bare[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_without_data_a_start_from_data_is_refused(build, how):
    with pytest.raises(InputError, match="needs data: call preprocess_"):
        get_peft_model(build(), data_config(how))


@pytest.mark.parametrize("how", ["corda", "lora_ga"])
def test_what_data_gave_is_kept_in_a_file(build, ids, tmp_path: Path, how):
    factors = []
    for _ in range(2):
        base = build()
        path = str(tmp_path / "cache" / f"{how}.safetensors")
        if how == "corda":
            config = data_config(how, corda_config=CordaConfig(cache_file=path))
            run = None if factors else lambda base=base: base(ids)
            preprocess_corda(base, config, run)
        else:
            config = data_config(how, lora_ga_config=LoraGAConfig(direction="ArBr"))
            step = lambda base=base: base(ids, labels=ids).loss  # noqa: E731
            preprocess_loraga(base, config, step, cache_file=path)
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        factors.append(model.adapter_tensors("default"))
    for key, tensor in factors[0].items():
        torch.testing.assert_close(factors[1][key], tensor)
    (tmp_path / "cache" / f"{how}.safetensors").write_bytes(b"no tensors")
    again = {
        "corda": lambda: preprocess_corda(build(), config),
        "lora_ga": lambda: preprocess_loraga(build(), config, lambda: None, cache_file=path),
    }
    with pytest.raises(InputError, match="not a safetensors file"):
        again[how]()


def test_eva_deals_ranks_out_and_says_so_in_the_configuration(build, ids, tmp_path):
    base = build()
    expected = output(base, ids)
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )
    model = get_peft_model(base, config)
    state = get_eva_state_dict(model, batches(ids))
    initialize_lora_eva_weights(model, eva_state_dict=state)
    torch.testing.assert_close(output(model, ids), expected, rtol=0, atol=1e-12)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert {path: layer.r["default"] for path, layer in layers.items()} == {
        path: len(A) for path, A in state.items() if len(A)
    }
    assert sum(len(A) for A in state.values()) == 3 * len(state)
    for path, layer in layers.items():
        assert torch.equal(layer.lora_A["default"].weight.detach(), state[path].double())
        assert layer.scaling["default"] == pytest.approx(2)  # alpha grew with the rank
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(layers)
    for layer in layers.values():
        nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path).double()
    torch.testing.assert_close(output(theirs, ids), output(model, ids), rtol=0, atol=1e-10)


def test_eva_without_its_configuration_or_data_is_refused(build):
    with pytest.raises(InputError, match="needs init_lora_weights='eva'"):
        initialize_lora_eva_weights(wrap(build()))
    model = get_peft_model(build(), LoraConfig(init_lora_weights="eva"))
    with pytest.raises(InputError, match="a dataloader or eva_state_dict"):
        initialize_lora_eva_weights(model)
    with pytest.raises(InputError, match="this model lacks: nothing"):
        initialize_lora_eva_weights(model, eva_state_dict={"nothing": torch.zeros(1, 1)})


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_quantises_the_base_and_makes_up_for_it(build, ids, tmp_path, bits):
    base = build()
    whole = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    expected = output(base, ids)
    settings = {"loftq_bits": bits, "loftq_iter": 2}
    config = LoraConfig(
        r=6, target_modules=TARGETS, init_lora_weights="loftq", loftq_config=settings
    )
    model = get_peft_model(base, config)
    with model.disable_adapter():
        quantized = output(model, ids)
    adapted = output(model, ids)
    assert (adapted - expected).norm() < (quantized - expected).norm()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(), tmp_path)
    torch.testing.assert_close(output(again, ids), adapted, rtol=0, atol=1e-12)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(output(merged, ids), adapted, rtol=0, atol=1e-10)
    with pytest.raises(InputError, match="cannot stand beside others"):
        model.add_adapter("other", LoraConfig(target_modules=TARGETS))
    assert torch.equal(model.unload().model.layers[0].self_attn.q_proj.weight, whole)


def test_mica_trains_a_alone_between_minor_directions(build, ids):
    base = build()
    expected = output(base, ids)
    targets = ["q_proj", "embed_tokens"]
    model = get_peft_model(base, LoraConfig(r=3, target_modules=targets, init_lora_weights="mica"))
    torch.testing.assert_close(output(model, ids), expected, rtol=0, atol=1e-12)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_A" in name or "lora_embedding_A" in name for name in trained)
    layer = model.model.model.layers[0].self_attn.q_proj
    U, _, _ = torch.linalg.svd(layer.base_layer.weight)
    overlap = torch.linalg.svdvals(U[:, -3:].T @ layer.lora_B["default"].weight)
    torch.testing.assert_close(overlap, torch.ones(3, dtype=torch.float64))
    model.set_requires_grad("default", False)
    model.set_adapter("default")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
