"""What scripts written for PEFT call: status, hot-swapping, optimisers, copies, Trainer."""

import copy
import inspect
import pickle
import warnings
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer as peft_loraplus
from torch import nn

from families import output, to_peft, wrap
from lorakit import LoraConfig, LoraModel, PeftModel, get_peft_model
from lorakit.errors import InputError
from lorakit.lora.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    loraplus_groups,
)
from lorakit.lora.peft_api.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian"])
def test_a_new_adapter_changes_nothing_and_leaves_the_base_as_it_is(build, ids, tmp_path, how):
    base = build()
    model = wrap(copy.deepcopy(base), target_modules="all-linear", init_lora_weights=how)
    # The random halves of `orthogonal` are float32, and orthogonal as far as that goes.
    zero = 1e-6 if how == "orthogonal" else 1e-10
    torch.testing.assert_close(output(model, ids), output(base, ids), rtol=0, atol=zero)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = output(model, ids)
    assert (expected - output(base, ids)).abs().max() > 1e-4
    model.save_pretrained(tmp_path / "own")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "own")
    assert torch.equal(output(again, ids), expected)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion="yes")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "plain").double()
    torch.testing.assert_close(output(theirs, ids), expected, rtol=0, atol=1e-10)
    model.merge_adapter()
    torch.testing.assert_close(output(model, ids), expected, rtol=0, atol=1e-10)
    bare = model.unload()
    for (name, ours), (_, before) in zip(
        bare.named_parameters(), base.named_parameters(), strict=True
    ):
        assert torch.equal(ours, before), name
        assert ours.requires_grad, name


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_an_adapter_that_peft_started_from_the_weight_is_understood(build, ids, tmp_path, how):
    base = build().float()
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=how)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(output(ours, ids), output(theirs, ids), rtol=0, atol=1e-5)


def test_status_says_what_is_active_merged_and_trained(build):
    model = wrap(build(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"]))
    status = model.get_model_status()
    assert status.adapter_model_type == "LoraModel"
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.available_adapters == ["default", "other"]
    assert status.requires_grad == {"default": True, "other": False}
    assert status.num_adapter_layers == len(model.get_layer_status()) == 5
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    model.merge_adapter(["other"])
    assert model.get_model_status().merged_adapters == ["other"]
    (layer,) = [s for s in model.get_layer_status() if s.name.endswith("0.self_attn.q_proj")]
    assert layer.module_type == "lora.Linear"
    assert layer.merged_adapters == ["other"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


@pytest.mark.parametrize("fields", [{}, {"r": 3}, {"target_modules": ["q_proj"], "lora_alpha": 3}])
def test_hot_swapping_is_loading_the_other_adapter_in_place(build, ids, tmp_path, fields):
    base = build()
    targets = {"target_modules": ["q_proj", "embed_tokens", "down_proj"]}
    wrap(copy.deepcopy(base), seed=8, **{**targets, **fields}).save_pretrained(tmp_path)
    model = wrap(copy.deepcopy(base), **targets, use_rslora=True)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    hotswap_adapter(model, tmp_path, "default")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(model, ids), output(loaded, ids))
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "another base model"),
        ({"use_dora": True}, "another base model"),
    ],
)
def test_what_does_not_fit_is_not_swapped(build, ids, tmp_path, fields, words):
    wrap(build(), **{"target_modules": ["q_proj"], **fields}).save_pretrained(tmp_path)
    model = wrap(build(), target_modules=["q_proj"])
    expected = output(model, ids)
    with pytest.raises(InputError, match=words):
        hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(output(model, ids), expected)


@pytest.mark.parametrize("prepared", [False, True])
def test_an_adapter_of_larger_rank_is_swapped_in(build, ids, tmp_path, prepared):
    base = build()
    targets = {"target_modules": ["q_proj", "embed_tokens"]}
    wrap(copy.deepcopy(base), seed=8, r=12, **targets).save_pretrained(tmp_path)
    model = wrap(copy.deepcopy(base), **targets)
    before = output(model, ids)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=12)
        assert model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.shape[0] == 12
        torch.testing.assert_close(output(model, ids), before, rtol=0, atol=1e-12)
    hotswap_adapter(model, tmp_path, "default")
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(output(model, ids), output(loaded, ids))
    model.merge_adapter()
    with pytest.raises(InputError, match="unmerge it first"):
        hotswap_adapter(model, tmp_path, "default")


def test_an_adapter_beside_a_grouped_convolution_is_swapped_in(tmp_path):
    x = torch.randn(2, 4, 6, 6)
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    saved = wrap(copy.deepcopy(base), seed=8, r=6, target_modules=["0"])
    saved.save_pretrained(tmp_path)
    for r in (2, 10):
        model = wrap(copy.deepcopy(base), r=r, target_modules=["0"])
        hotswap_adapter(model, tmp_path, "default")
        torch.testing.assert_close(model(x), saved(x))


def test_loraplus_gives_every_trained_parameter_one_rate(build):
    model = wrap(build(), target_modules=["q_proj", "embed_tokens"], use_dora=True)
    groups = loraplus_groups(model, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for g in groups)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in rates
        elif "embed_tokens" in name:
            assert rates[id(parameter)] == (1e-6, 0.1)
        elif "lora_A" in name:
            assert rates[id(parameter)] == (1e-3, 0.1)
        elif "lora_B" in name:
            assert rates[id(parameter)] == (1.6e-2, 0.1)
        else:
            assert rates[id(parameter)] == (1.6e-2, 0.0)


def test_loraplus_steps_as_pefts_does(build, ids, tmp_path):
    base = build()
    ours = wrap(copy.deepcopy(base), target_modules=["q_proj", "down_proj"])
    theirs = to_peft(ours, base, tmp_path, trainable=True)
    options = {"lr": 1e-2, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1}
    makers = (create_loraplus_optimizer, peft_loraplus)
    for model, make in zip((ours, theirs), makers, strict=True):
        optimizer = make(model, torch.optim.AdamW, **options)
        for _ in range(3):
            output(model, ids).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(output(ours, ids), output(theirs, ids), rtol=0, atol=1e-9)


def test_lorafa_trains_b_alone_with_the_projected_gradient(build, ids):
    model = wrap(build(), target_modules=["q_proj", "down_proj"], r=3, lora_alpha=5)
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = create_lorafa_optimizer(model, lr=1e-2)
    output(model, ids).square().sum().backward()
    A, B = layer.matrices("default")
    gradient = B.grad.clone()
    optimizer.step()
    expected = (
        gradient @ torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(3)) / layer.scaling["default"] ** 2
    )
    torch.testing.assert_close(B.grad, expected, rtol=1e-8, atol=1e-12)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == ("lora_B" not in name), name


def test_a_model_where_nothing_is_trained_is_said_at_once(build, tmp_path):
    wrap(build(), target_modules=["q_proj"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build(), tmp_path)
    with pytest.warns(UserWarning, match="is_trainable=True"):
        model.train()
    with pytest.raises(InputError, match="nothing is trainable"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4)
    with pytest.raises(InputError, match="nothing is trainable"):
        create_lorafa_optimizer(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(build(), tmp_path, is_trainable=True).train()


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(build, ids, way: str):
    model = wrap(build(), target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    again = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(output(again, ids), output(model, ids))
    again.set_adapter("other")
    assert model.active_adapters == ["default"]
    assert not torch.equal(output(again, ids), output(model, ids))


def test_the_base_models_signature_shows_through(build):
    model = wrap(build(), target_modules=["q_proj"])
    names = inspect.signature(model.forward).parameters
    assert list(names) == list(inspect.signature(model.get_base_model().forward).parameters)
    assert "input_ids" in names


@pytest.mark.exhaustive
def test_compiled_it_computes_the_same(build, ids):
    model = wrap(build().float(), target_modules="all-linear", lora_dropout=0.0)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(output(compiled, ids), output(model, ids), rtol=0, atol=1e-5)
    model.train()
    for each in (model, compiled):
        each.zero_grad()
        output(each, ids).square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if each is model:
            expected = gradients
    for ours, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranges", [[[0, 2], [0, 2]], [(0, 1), (1, 2), (1, 2)]])
def test_replicated_layers_share_weights_and_have_their_own_adapters(build, ids, tmp_path, ranges):
    base = build()
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "layer_replication": ranges}
    model = wrap(copy.deepcopy(base), **fields)
    numbers = [i for start, stop in ranges for i in range(start, stop)]
    layers = model.get_base_model().model.layers
    assert model.config.num_hidden_layers == len(layers) == len(numbers)
    first = layers[numbers.index(1)].mlp.up_proj.weight
    last = len(numbers) - 1 - numbers[::-1].index(1)
    assert layers[last].mlp.up_proj.weight is first
    assert layers[last].self_attn.layer_idx == last
    theirs = to_peft(model, base, tmp_path)
    expected = output(model, ids)
    torch.testing.assert_close(output(theirs, ids), expected, rtol=0, atol=1e-10)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(output(merged, ids), expected, rtol=0, atol=1e-10)
    bare = model.unload()
    assert bare.config.num_hidden_layers == 2
    assert torch.equal(output(bare, ids), output(base, ids))
    with pytest.raises(InputError, match="is not within the 2 layers"):
        wrap(copy.deepcopy(base), target_modules=["q_proj"], layer_replication=[[0, 3]])


@pytest.mark.parametrize(("task", "head"), [("SEQ_CLS", "score"), ("TOKEN_CLS", "score")])
def test_a_new_head_is_trained_and_saved_with_the_adapter(tmp_path, task: str, head: str):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from families import SIZES

    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_attention_heads=4))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type=task))
    assert model.peft_config["default"].modules_to_save == [head]
    assert model.score.modules_to_save["default"].weight.requires_grad
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(theirs.score.modules_to_save["default"].weight, model.score.weight)


def test_dtype_of_adapters_is_the_one_asked_for(build, tmp_path):
    half = {"target_modules": ["q_proj"], "use_dora": True}
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(
            build().bfloat16(), LoraConfig(**half), autocast_adapter_dtype=autocast
        )
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        model.save_pretrained(tmp_path)
        again = LoraModel.from_pretrained(
            build().bfloat16(), tmp_path, autocast_adapter_dtype=autocast
        )
        own = again.adapter_tensors("default").values()
        assert {tensor.dtype for tensor in own} == {dtype}


def test_an_empty_tensor_is_never_saved(build, tmp_path):
    model = wrap(build(), target_modules=["q_proj"])
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = nn.Parameter(torch.empty(0))
    with pytest.raises(InputError, match="is empty here"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
