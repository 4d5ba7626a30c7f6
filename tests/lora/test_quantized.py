"""bitsandbytes' layers of 4 and 8 bits, on the processor."""

import copy
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

from families import wrap
from lorakit import LoraConfig, LoraMonitor, PeftModel, get_peft_model
from lorakit.errors import InputError
from lorakit.lora.layers.quantized import LoraQuantizedLinear
from lorakit.weight_formats import dequantized

KINDS = ["nf4", "nf4 twice", "fp4", "int8"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Small(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = quantize(nn.Linear(64, 128), kind)
        self.second = quantize(nn.Linear(128, 64, bias=False), kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def quantize(linear: nn.Linear, kind: str) -> nn.Module:
    d_in, d_out, bias = linear.in_features, linear.out_features, linear.bias is not None
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(d_in, d_out, bias=bias, has_fp16_weights=False)
    else:
        method, *twice = kind.split()
        options = {"quant_type": method, "compress_statistics": bool(twice)}
        layer = bnb.nn.Linear4bit(d_in, d_out, bias=bias, compute_dtype=torch.float32, **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest) -> nn.Module:
    return Small(request.param)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of the input and of the adapter, in the order of their names."""
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    found = {
        name.replace("base_model.model.", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return [x.grad, *(found[name] for name in sorted(found))]


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True, "r": 3}])
def test_outputs_and_gradients_are_those_of_peft(base, x, tmp_path, fields):
    model = wrap(copy.deepcopy(base), target_modules="all-linear", **fields)
    assert isinstance(model.get_base_model().first, LoraQuantizedLinear)
    model.save_pretrained(tmp_path)
    if isinstance(base.first, bnb.nn.Linear8bitLt) and "use_dora" in fields:
        pytest.skip("PEFT 0.21 fails here, as the scales have moved")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    torch.testing.assert_close(model(x), theirs(x), **CLOSE)
    for own, other in zip(gradients(model, x), gradients(theirs, x), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)
    again = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))


def test_adapters_are_float32_and_gradients_reach_the_input(base, x):
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    tensors = model.adapter_tensors("default").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    trained, total = model.get_nb_trainable_parameters()
    assert 0 < trained < total
    assert all(gradient.isfinite().all() for gradient in gradients(model, x))


def test_gradients_reach_the_input_after_an_evaluation_too(base, x):
    model = wrap(base, target_modules="all-linear")
    expected = gradients(model.train(), x)
    with torch.no_grad():
        model.eval()(x)
    for own, other in zip(gradients(model.train(), x), expected, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("fields", [{}, {"lora_dropout": 0.2}, {"use_dora": True}])
def test_exact_beside_the_dequantised_product(base, x, fields):
    plain = copy.deepcopy(base)
    for name, layer in [("first", plain.first), ("second", plain.second)]:
        whole = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        whole.weight.data = dequantized(layer.weight, layer)
        whole.bias = layer.bias
        setattr(plain, name, whole)
    model, exact = (
        wrap(one, target_modules="all-linear", **fields).train() for one in (base, plain)
    )
    exact.load_state_dict(
        {key: value for key, value in model.state_dict().items() if "lora_" in key}, strict=False
    )
    found = []
    for one in (model, exact):
        torch.manual_seed(3)
        found.append([one(x), *gradients(one, x)])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), exact.eval()(x), rtol=1e-6, atol=1e-6)


def test_no_unpacked_weight_is_kept_for_the_backward_pass(base, x):
    model = wrap(base, target_modules="all-linear").train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        model(x.requires_grad_())
    assert kept
    assert max(kept) < 64 * 128


def test_a_layer_that_was_laid_out_for_evaluation_is_laid_out_as_it_was(x):
    if not Small("nf4").first.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes lays nothing out anew on this processor")
    for kind in ("nf4", "nf4 twice"):
        packed = Small(kind)
        with torch.no_grad():
            packed.eval()(x)
        packed.train()
        assert packed.first.weight.quant_state.packing_format_for_cpu
        expected, found = (
            gradients(wrap(one, target_modules="all-linear"), x) for one in (Small(kind), packed)
        )
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=2e-2, atol=2e-2)  # scales were rounded


def test_rows_choose_among_adapters(base, x):
    model = wrap(base, target_modules="all-linear")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    rows = ["default", "__base__", "other", "default", "other"]
    mixed = model(x, adapter_names=rows)
    for i, name in enumerate(rows):
        model.set_adapter([] if name == "__base__" else name)
        torch.testing.assert_close(mixed[i], model(x)[i], **CLOSE)


def test_merging_rounds_says_so_and_is_taken_back_to_the_byte(base, x):
    model = wrap(base, target_modules=["first"])
    layer = model.get_base_model().first
    weight, alone = layer.base_weight, model(x)
    before = dequantized(weight, layer.base_layer)
    exact = before + layer.get_delta_weight("default")
    for _ in range(3):
        with pytest.warns(UserWarning, match="rounds its weight again"):
            model.merge_adapter()
        merged = dequantized(layer.base_weight)
        assert (merged - exact).norm() < 0.15 * exact.norm()
        assert not torch.equal(merged, before)
        assert model(x).isfinite().all()
        model.unmerge_adapter()
        assert layer.base_weight is weight
        assert torch.equal(dequantized(weight), before)
        assert torch.equal(model(x), alone)


def test_taken_out_the_base_is_as_it_was(base, x):
    expected = base(x)
    first = base.first
    model = wrap(base, target_modules="all-linear")
    assert not torch.equal(model(x), expected)
    assert model.unload().first is first
    assert torch.equal(base(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = wrap(base, target_modules="all-linear").merge_and_unload()
    assert type(merged.first) is type(first)
    assert merged(x).isfinite().all()


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_start_from_the_weight_takes_it_as_it_is_stored(base, x, how):
    expected = base(x)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=how)
    torch.testing.assert_close(get_peft_model(base, config)(x), expected, **CLOSE)


def test_the_monitor_measures_the_numbers_that_the_weight_stands_for(base):
    model = wrap(base, target_modules=["first"])
    layer = model.get_base_model().first
    W = dequantized(layer.base_weight, layer.base_layer)
    assert LoraMonitor(model).measure()["first"].weight_norm == pytest.approx(W.norm().item())


def test_loftq_wants_a_whole_weight(base):
    with pytest.raises(InputError, match="not quantised yet"):
        wrap(base, target_modules="all-linear", init_lora_weights="loftq")


def test_dora_lengthens_the_weight_as_it_is_stored(base, x):
    model = wrap(base, target_modules=["first"], use_dora=True).train()
    layer = model.get_base_model().first
    W = dequantized(layer.base_weight, layer.base_layer)
    V = W + layer.get_delta_weight("default")
    length = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        length.mul_(1.5)
    expected = x @ (length[:, None] * V / V.norm(dim=1, keepdim=True)).T + layer.base_bias
    assert (layer(x) - expected).norm() < 0.02 * expected.norm()
