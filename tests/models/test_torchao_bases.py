"""Base models whose files hold torchao's weights of 8 and 4 bits; skipped without torchao."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

import lorakit
from answered import tokens
from lorakit.adapters.open import open_adapter
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.lora.layers.quantized import LoraQuantizedLinear
from lorakit.weight_formats import dequantized, format_of
from plain_adapters import save_adapter
from small_runs import recipe

torchao = pytest.importorskip("torchao.quantization")

KINDS: dict[str, Any] = {
    "int8": torchao.Int8WeightOnlyConfig(),
    "int4": torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16)),
}
TEXT = "Paris is the capital of France."


@pytest.fixture(scope="module", params=KINDS)
def packed(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("torchao") / request.param
    config = TorchAoConfig(KINDS[request.param])
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def logits(model: nn.Module, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt")).logits


def unpacked(folder: Path) -> Any:
    """The model with plain weights: what the packed ones stand for."""
    model, _ = lorakit.load_model(str(folder), "float32")
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if format_of(weight):
                setattr(module, name, nn.Parameter(dequantized(weight), requires_grad=False))
    return model


def test_outputs_and_gradients_are_those_beside_the_unpacked_weights(packed: Path):
    found = []
    for make in (lambda: lorakit.load_model(str(packed), "float32")[0], lambda: unpacked(packed)):
        torch.manual_seed(2)
        config = lorakit.LoraConfig(target_modules="all-linear", init_lora_weights=False)
        model = lorakit.get_peft_model(make(), config).train()
        ids = torch.tensor([[5, 6, 7, 8]])
        model(input_ids=ids, labels=ids).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append((model(input_ids=ids).logits, gradients))
        kinds = {type(m) for m in model.modules() if isinstance(m, LoraQuantizedLinear)}
    assert not kinds  # the second one is plain, the first one is not
    (own, gradients), (other, expected) = found
    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_a_run_its_answers_and_its_merge(packed: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    sums = [{"prompt": f"what is {n} + {n}?", "completion": str(2 * n)} for n in range(40)]
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in sums))
    result = lorakit.train(recipe(packed, rows, tmp_path / "run"), quiet=True)
    assert result.eval_loss < result.manifest.base_eval_loss
    assert result.manifest.base_fingerprint
    opened = open_adapter(tmp_path / "run", dtype="float32")
    assert any(isinstance(m, LoraQuantizedLinear) for m in opened.model.modules())
    report = lorakit.merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    assert report.passed
    assert "quantised (torchao)" in report.notices[0]
    merged, tokenizer = lorakit.load_model(str(tmp_path / "merged"), "float32")
    torch.testing.assert_close(
        logits(merged, tokenizer), logits(opened.model, tokenizer), rtol=1e-4, atol=1e-4
    )


def test_an_engine_answers_beside_it(packed: Path, tmp_path: Path):
    folder = save_adapter(packed, tmp_path / "one", target_modules="all-linear", r=4)
    engine = open_engine(None, {"one": folder}, dtype="float32")
    try:
        prompt = engine.tokenizer(TEXT).input_ids
        found = tokens(engine.submit(prompt, "one", Sampling(max_new_tokens=8, logprobs=0)))
    finally:
        engine.close()
    model = open_adapter(folder, dtype="float32").model
    ids = torch.tensor([prompt])
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert found == expected[0, len(prompt) :].tolist()


def test_merging_in_place_unpacks_and_is_taken_back(packed: Path):
    model, tokenizer = lorakit.load_model(str(packed), "float32")
    config = lorakit.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = lorakit.get_peft_model(model, config).eval()
    before = logits(adapted, tokenizer)
    with pytest.warns(UserWarning, match="leaves its weight unpacked"):
        adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted, tokenizer), before, rtol=1e-4, atol=1e-4)
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted, tokenizer), before)


def test_a_form_without_a_way_back_to_numbers_is_refused():
    from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor

    layer = nn.Linear(32, 16, bias=False)
    sealed = Int4Tensor(
        qdata=torch.zeros(16, 16, dtype=torch.int8),
        scale=torch.ones(1, 16),
        zero_point=torch.zeros(1, 16),
        block_size=[1, 32],
        shape=torch.Size([16, 32]),
    )
    layer.weight = nn.Parameter(sealed, requires_grad=False)
    with pytest.raises(InputError, match="Int4Tensor, through which no gradients go"):
        lorakit.get_peft_model(nn.Sequential(layer), lorakit.LoraConfig(target_modules=["0"]))
