"""Weights of 8 bits for inference: what they stand for, alone and beneath adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit
from answered import tokens
from command import run_lorakit
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.models.quantization.int8_linear import FEW_TOKENS, Int8Linear, Int8Weight
from lorakit.models.rounding import stored_as
from lorakit.weight_formats import dequantized
from random_adapters import make_adapter


def test_no_weight_moves_by_more_than_half_a_step():
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_and_many_get_the_product_of_the_same_weights(dtype: torch.dtype):
    torch.manual_seed(0)
    layer: Any = stored_as(nn.Sequential(nn.Linear(48, 20)).to(dtype), "int8")[0]
    assert type(layer) is Int8Linear
    W, tolerance = dequantized(layer.weight, dtype=torch.float64), 8 * torch.finfo(dtype).eps
    for shape in ((1,), (2, 3), (FEW_TOKENS + 1,)):
        x = torch.randn(*shape, 48).to(dtype)
        wanted = x.double() @ W.T + layer.bias.double()
        with torch.no_grad():
            assert (layer(x).double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    x = torch.randn(4, 48, dtype=dtype, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert (x.grad - W.sum(0)).abs().max() <= tolerance * W.sum(0).abs().max()


def test_adapters_answer_beside_integers_as_beside_what_these_stand_for(
    attentive_folder: Path, tmp_path: Path
):
    kinds: dict[str, dict[str, Any]] = {
        "all": {"r": 3},
        "dora": {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    }
    adapters = {
        name: make_adapter(attentive_folder, tmp_path / name, seed, **kind)
        for seed, (name, kind) in enumerate(kinds.items())
    }
    prompts, who = [[5, 6, 7, 8], list(range(40, 70)), [9]], ["all", "dora", None]
    engine = open_engine(
        str(attentive_folder), adapters, dtype="float32", max_rows=3, weights="int8"
    )
    try:
        assert engine.notices == []  # the adapters are known to be for this base
        sampling = Sampling(max_new_tokens=10, logprobs=0, end_tokens=frozenset())
        asked = [engine.submit(p, w, sampling) for p, w in zip(prompts, who, strict=True)]
        found = [tokens(ticket) for ticket in asked]
        rounded = {
            path: dequantized(module.weight)
            for path, module in engine.resident.base.named_modules()
            if isinstance(module, Int8Linear)
        }
    finally:
        engine.close()
    for answer, prompt, name in zip(found, prompts, who, strict=True):
        model: Any = lorakit.load_model(str(attentive_folder), "float32")[0]
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


def test_what_cannot_be_rounded_is_refused(attentive_folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match="int3"):
        stored_as(nn.Linear(2, 2), "int3")
    with pytest.raises(InputError, match="no linear layers"):
        stored_as(nn.Sequential(nn.Embedding(2, 2)), "int8")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    options = ["--prompts", "prompts.jsonl", "--model", attentive_folder, "--max-new-tokens", "3"]
    assert run_lorakit(tmp_path, "generate", *options, "--weights", "int3").returncode == 2
    assert run_lorakit(tmp_path, "generate", *options, "--weights", "int8").returncode == 0
