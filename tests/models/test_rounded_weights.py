"""Weights of 8 and 4 bits for inference: what they stand for, alone and beneath adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import lorakit
from answered import tokens
from command import run_lorakit
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.lora import LoraConfig, LoraModel, get_peft_model
from lorakit.lora.parameters import numbers_in
from lorakit.models.quantization import int4_weight
from lorakit.models.quantization.int4_weight import Int4Weight
from lorakit.models.quantization.int8_weight import Int8Weight
from lorakit.models.quantization.rounded_linear import RoundedLinear
from lorakit.models.rounding import WEIGHTS, stored_as
from lorakit.weight_formats import dequantized
from random_adapters import make_adapter
from tiny import make_attentive, save_tiny_model


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose attention has sizes for 4 bits, and whose MLPs have not."""
    folder = save_tiny_model(tmp_path_factory.mktemp("wide"), hidden_size=128)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    make_attentive(model)
    model.save_pretrained(folder)
    return folder


def test_no_weight_moves_by_more_than_half_a_step_of_its_row():
    torch.manual_seed(0)
    W = torch.randn(7, 40) * torch.tensor([1e-6, 1e-3, 1, 10, 1e4, 1, 1])[:, None]
    W[5] = 0
    before = W.clone()
    weight = Int8Weight.of(W)
    assert torch.equal(W, before)  # an embedding may have the same weight
    step = weight.scales.double()[:, None]
    assert weight.abs().max() <= 127
    assert ((dequantized(weight, dtype=torch.float64) - W).abs() <= step * 0.50001).all()
    assert (step.flatten() <= 1.01 * W.abs().amax(1).clamp(min=1e-30) / 127).all()


def test_4_bits_are_nearer_than_equal_steps_between_the_least_and_the_largest():
    torch.manual_seed(0)
    W = torch.randn(128, 3, 32) * 10.0 ** torch.randint(-6, 5, (128, 3, 1))
    before = W.clone()
    weight = Int4Weight.of(W.flatten(1))
    assert torch.equal(W, before)
    found = dequantized(weight, dtype=torch.float64).view(128, 3, 32)
    least, largest = W.double().aminmax(dim=-1, keepdim=True)
    step = (largest - least) / 15
    plain = ((W - least) / step).round() * step + least
    off, plain_off = ((one - W).square().sum(-1) / W.square().sum(-1) for one in (found, plain))
    assert (off <= 1.05 * plain_off).all()  # the scales are rounded to bfloat16
    assert off.mean() < 0.95 * plain_off.mean()
    assert numbers_in(weight) == W.numel()
    assert weight.nbytes + weight.scales.nbytes == W.numel() * 5 // 8


def test_groups_of_16_values_are_kept_as_they_are():
    torch.manual_seed(0)
    step, least = torch.rand(64, 3, 1) + 0.1, -torch.rand(64, 3, 1)
    q = torch.stack([torch.randperm(32) % 16 for _ in range(192)]).view(64, 3, 32)
    W = step.bfloat16().float() * q + least.bfloat16().float()
    W[3], W[4, 1] = 0, -2.5
    weight = Int4Weight.of(W.flatten(1))
    found = dequantized(weight, dtype=torch.float32).view(64, 3, 32)
    # A middle, which may have more digits than bfloat16, is rounded to it.
    assert ((found - W).abs() <= W.abs().amax(-1, keepdim=True) / 256).all()


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_and_many_get_the_product_of_the_same_weights(dtype: torch.dtype, form: str):
    torch.manual_seed(0)
    layer: Any = stored_as(nn.Sequential(nn.Linear(96, 128)).to(dtype), form)[0]
    assert type(layer) is RoundedLinear
    assert layer.weight.form == form
    W, tolerance = dequantized(layer.weight, dtype=torch.float64), 8 * torch.finfo(dtype).eps
    for shape in ((1,), (2, 3), (layer.weight.few_tokens + 1,)):
        x = torch.randn(*shape, 96).to(dtype)
        wanted = x.double() @ W.T + layer.bias.double()
        with torch.no_grad():
            assert (layer(x).double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    x = torch.randn(4, 96, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert (x.grad - W.sum(0)).abs().max() <= tolerance * W.sum(0).abs().max()


def test_integers_are_unpacked_where_pytorchs_product_reads_others(
    monkeypatch: pytest.MonkeyPatch,
):
    torch.manual_seed(0)
    weight, x = Int4Weight.of(torch.randn(64, 64)), torch.randn(3, 64)
    monkeypatch.setattr(int4_weight, "_torch_reads_it", lambda: False)
    expected = x.double() @ weight.unpacked(torch.float64).T
    assert torch.allclose(weight.product(x).double(), expected, rtol=0, atol=1e-4)


def test_pytorchs_product_reads_them_on_processors_with_avx512():
    assert int4_weight._torch_reads_it() == (torch.backends.cpu.get_cpu_capability() == "AVX512")


def test_a_merge_rounds_again_and_undoing_it_gives_the_very_integers_back():
    torch.manual_seed(0)
    layer: Any = stored_as(nn.Sequential(nn.Linear(64, 64, bias=False)), "int4")
    before = layer[0].weight
    model = get_peft_model(layer, LoraConfig(r=2, target_modules=["0"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = model(x)
        with pytest.warns(UserWarning, match="rounds its weight again"):
            model.merge_adapter()
        merged = layer[0].base_layer.weight
        assert type(merged) is Int4Weight
        assert torch.allclose(model(x), expected, rtol=0, atol=0.1 * expected.abs().max().item())
        model.unmerge_adapter()
    assert layer[0].base_layer.weight is before


@pytest.mark.parametrize("form", WEIGHTS)
def test_adapters_answer_beside_integers_as_beside_what_these_stand_for(
    wide_folder: Path, tmp_path: Path, form: str
):
    kinds: dict[str, dict[str, Any]] = {
        "all": {"r": 3},
        "dora": {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    }
    adapters = {
        name: make_adapter(wide_folder, tmp_path / name, seed, **kind)
        for seed, (name, kind) in enumerate(kinds.items())
    }
    prompts, who = [[5, 6, 7, 8], list(range(40, 70)), [9]], ["all", "dora", None]
    engine = open_engine(str(wide_folder), adapters, dtype="float32", max_rows=3, weights=form)
    try:
        assert engine.notices == []  # the adapters are known to be for this base
        sampling = Sampling(max_new_tokens=10, logprobs=0, end_tokens=frozenset())
        asked = [engine.submit(p, w, sampling) for p, w in zip(prompts, who, strict=True)]
        found = [tokens(ticket) for ticket in asked]
        forms = {
            module.weight.form
            for module in engine.resident.base.modules()
            if isinstance(module, RoundedLinear)
        }
        assert forms == {"int8", form}  # of 4 bits as well, where the sizes are round
        rounded = {
            path: dequantized(module.weight)
            for path, module in engine.resident.base.named_modules()
            if isinstance(module, RoundedLinear)
        }
    finally:
        engine.close()
    for answer, prompt, name in zip(found, prompts, who, strict=True):
        model: Any = lorakit.load_model(str(wide_folder), "float32")[0]
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        for path, weight in rounded.items():
            layer = model.get_submodule(path.replace(".base_layer", ""))
            layer.weight = nn.Parameter(weight, requires_grad=False)
        assert not tied or model.lm_head.weight is not model.model.embed_tokens.weight
        if name:
            model = LoraModel.from_pretrained(model, adapters[name]).eval()
        ids = list(prompt)
        with torch.no_grad():
            for token in answer:
                assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
                ids.append(token)


def test_what_cannot_be_rounded_is_refused(wide_folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="int3"):
        stored_as(nn.Linear(2, 2), "int3")
    with pytest.raises(InputError, match="no linear layers"):
        stored_as(nn.Sequential(nn.Embedding(2, 2)), "int8")
    with pytest.raises(InputError, match=r"64 divides and whose inputs 32: give --weights int8"):
        stored_as(nn.Sequential(nn.Linear(64, 65), nn.Linear(65, 64)), "int4")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    options = ["--prompts", "prompts.jsonl", "--model", wide_folder, "--max-new-tokens", "3"]
    assert run_lorakit(tmp_path, "generate", *options, "--weights", "int3").returncode == 2
    assert run_lorakit(tmp_path, "generate", *options, "--weights", "int4").returncode == 0


def test_the_output_layer_keeps_8_bits(wide_folder: Path):
    config = LlamaConfig.from_pretrained(wide_folder, vocab_size=320, intermediate_size=192)
    model: Any = stored_as(AutoModelForCausalLM.from_config(config), "int4")
    forms = {
        name: layer.weight.form
        for name, layer in model.named_modules()
        if hasattr(layer, "in_features")
    }
    assert forms.pop("lm_head") == "int8"
    assert set(forms.values()) == {"int4"}
