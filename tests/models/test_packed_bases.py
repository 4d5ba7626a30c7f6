"""Base models as they are published quantised: GPTQ, AWQ, FP8, MXFP4, compressed-tensors."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lorakit
from answered import tokens
from lorakit.adapters.open import open_adapter
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.lora.layers import LoraQuantizedLinear
from lorakit.models.describe import describe
from lorakit.models.quantization.bits import integers
from lorakit.models.quantization.packed_linear import PackedLinear
from lorakit.weight_formats import dequantized
from matrix import few
from packed_models import FORMS, fp8, gptq, mxfp4, replace_weights, save_packed, words
from small_runs import recipe, save_sums
from tiny import byte_tokenizer, save_tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def plain_twin(folder: Path, stands_for: dict[str, torch.Tensor]) -> Any:
    """The model with plain weights, which transformers loads without any quantiser."""
    model = AutoModelForCausalLM.from_pretrained(
        save_tiny_model(folder / "plain", 64), dtype=torch.float32
    )
    missing = model.load_state_dict(stands_for, strict=False)
    assert not missing.unexpected_keys
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_it_was_packed_and_trained_beside(form: str, tmp_path: Path):
    stands_for = save_packed(form, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is unpacked, nothing left out
        model, _ = lorakit.load_model(str(tmp_path / "base"), "float32")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == len(stands_for) == 14
    for name, layer in packed.items():
        assert torch.equal(dequantized(layer.weight, layer), stands_for[f"{name}.weight"])
        # 4 or 8 bits a value, and the scales of groups of 16
        parts = [layer.weight.data, *layer.weight.parts.values()]
        values = layer.in_features * layer.out_features
        assert sum(part.nbytes for part in parts) < 1.5 * values
    twin = plain_twin(tmp_path, stands_for)
    found = []
    for base in (model, twin, copy.deepcopy(model)):
        torch.manual_seed(2)
        config = lorakit.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = lorakit.get_peft_model(base, config).train()
        loss = adapted(input_ids=IDS, labels=IDS).loss
        loss.backward()
        kinds = {isinstance(m, LoraQuantizedLinear) for m in adapted.modules()}
        assert (True in kinds) == (base is not twin)
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
        found[-1]["loss"] = loss.detach()
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", few(["gptq-shuffled", "awq", "fp8", "ct-pack"], "awq"))
def test_a_run_its_answers_and_its_merge(form: str, tmp_path: Path):
    base = tmp_path / "base"
    stands_for = save_packed(form, base)
    method = FORMS[form][1]["quant_method"]
    assert method in str(describe(str(base)).quantization)
    result = lorakit.train(
        recipe(base, save_sums(tmp_path / "rows.jsonl"), tmp_path / "run"), quiet=True
    )
    assert result.eval_loss < result.manifest.base_eval_loss
    assert result.manifest.base_fingerprint
    opened = open_adapter(tmp_path / "run", dtype="float32")
    expected = opened.model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    engine = open_engine(None, {"one": tmp_path / "run"}, dtype="float32")
    try:
        sampling = Sampling(max_new_tokens=6, logprobs=0)
        assert tokens(engine.submit(IDS[0].tolist(), "one", sampling)) == expected[0, 6:].tolist()
    finally:
        engine.close()
    report = lorakit.merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    assert report.passed
    assert f"quantised ({method})" in report.notices[0]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    deltas = {
        f"{name}.weight": layer.get_delta_weight("default")
        for name, layer in opened.model.get_base_model().named_modules()
        if isinstance(layer, LoraQuantizedLinear)
    }
    for name, value in stands_for.items():
        exact = value + deltas[name].detach() if name in deltas else value
        torch.testing.assert_close(merged[name], exact, rtol=0, atol=1e-7)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (tmp_path / "merged" / "quantize_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), logits(opened.model), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*are unpacked")
def test_gpt_oss_has_its_experts_unpacked_and_says_what_that_takes(tmp_path: Path):
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    base = tmp_path / "base"
    GptOssForCausalLM(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    settings = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    stands_for = replace_weights(
        base, mxfp4, settings, lambda n: n.endswith(("gate_up_proj", "down_proj")), "_"
    )
    with pytest.warns(UserWarning, match=r"4 weights of mxfp4 .* are unpacked: 0\.0 MB .* 0\.2 MB"):
        model, _ = lorakit.load_model(str(base), "float32")
    for name, value in stands_for.items():
        assert torch.equal(model.get_parameter(name), value)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # dequantises too
    torch.testing.assert_close(logits(model), logits(theirs))
    values = recipe(base, save_sums(tmp_path / "rows.jsonl"), tmp_path / "run")
    values["lora"]["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    lorakit.train(values, quiet=True)
    report = lorakit.merge(tmp_path / "run", tmp_path / "merged", dtype="float32")
    opened = open_adapter(tmp_path / "run", dtype="float32")
    assert report.passed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(opened.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pack", [fp8, gptq])
def test_experts_packed_one_by_one_are_stacked(pack: Any, tmp_path: Path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    whole = Qwen3MoeForCausalLM(config)
    base = tmp_path / "base"
    whole.save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    settings = FORMS[pack.__name__][1]
    stands_for = replace_weights(base, pack, settings, lambda n: n.endswith("_proj.weight"))
    assert sum(".experts." in name for name in stands_for) == 12
    with pytest.warns(UserWarning, match="12 weights of .* are unpacked"):
        model, _ = lorakit.load_model(str(base), "float32")
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 4
    tensors = load_file(base / "model.safetensors")
    plain = {n: t for n, t in tensors.items() if n in {"model.norm.weight"} or "norm" in n}
    (tmp_path / "plain").mkdir()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"):
        plain[name] = tensors[name]
    save_file({**plain, **stands_for}, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    config.save_pretrained(tmp_path / "plain")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-6)


def test_the_language_part_of_a_model_for_pictures_is_packed(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config={
            **sizes,
            "vocab_size": 259,
            "intermediate_size": 96,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        vision_config={**sizes, "intermediate_size": 32, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=200,
    )
    base = tmp_path / "base"
    Gemma3ForConditionalGeneration(config).save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    settings = {**FORMS["gptq"][1], "dynamic": {"-:.*vision_tower.*": {}}}
    stands_for = replace_weights(
        base, gptq, settings, lambda n: n.endswith("_proj.weight") and "vision" not in n
    )
    model, _ = lorakit.load_model(str(base), "float32")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert len(packed) == len(stands_for) == 7
    for name, layer in packed.items():  # whose names in the files are older ones
        (own,) = [
            value for file, value in stands_for.items() if file.endswith(f"{name[-14:]}.weight")
        ]
        assert torch.equal(dequantized(layer.weight, layer), own)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_integers_of_every_width_are_read_back(bits: int):
    values = torch.randint(0, 2**bits, (3, 50), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(integers(words(values, bits), bits, 50).long(), values)


def test_a_classifier_is_trained_on_a_packed_base(tmp_path: Path):
    save_packed("gptq", tmp_path / "base")
    lines = [{"text": f"{n} apples", "label": "ab"[n % 2]} for n in range(24)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    values = recipe(tmp_path / "base", rows, tmp_path / "run")
    values["lora"]["task_type"] = "SEQ_CLS"
    lorakit.train(values, quiet=True)
    assert lorakit.merge(tmp_path / "run", tmp_path / "merged", dtype="float32").passed


@pytest.mark.parametrize(
    ("form", "change", "said"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        ("awq", {"version": "gemv"}, "the version gemv"),
        ("ct-pack", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ("ct-pack", {"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
        ("fp8", {"quant_method": "someday"}, "quantised by someday, which is not read"),
    ],
)
def test_what_cannot_be_unpacked_is_refused(
    form: str, change: dict[str, Any], said: str, tmp_path: Path
):
    save_packed(form, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        lorakit.load_model(str(tmp_path))


def test_packed_weights_without_a_word_on_them_are_not_read_as_plain_ones(tmp_path: Path):
    save_packed("fp8", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]  # as beside ModelOpt's hf_quant_config.json
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"stored as F8_E4M3, and config\.json has no"):
        lorakit.load_model(str(tmp_path))


@pytest.mark.parametrize("damage", ["lacking", "shape"])
def test_damaged_parts_are_named(damage: str, tmp_path: Path):
    save_packed("gptq", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.scales"
    scales = tensors.pop(name)
    if damage == "shape":
        tensors[name] = scales[:, 8:].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="up_proj"):
        lorakit.load_model(str(tmp_path))


def test_compressed_tensors_itself_unpacks_the_same(tmp_path: Path):
    base = pytest.importorskip("compressed_tensors.compressors.base")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for form in ("ct-pack", "ct-symmetric", "ct-int8", "ct-float8", "ct-nvfp4"):
        pack, settings = FORMS[form]
        torch.manual_seed(3)
        parts, stands_for = pack(torch.randn(32, 64))
        weights = settings["config_groups"]["group_0"]["weights"]
        if form == "ct-nvfp4":
            weights = weights | {"group_size": 16}
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        kind = base.BaseCompressor.get_value_from_registry(settings["format"])
        wide = {
            n: t.float() if n == "weight_scale" and t.itemsize == 2 else t for n, t in parts.items()
        }
        theirs = kind.decompress(wide, scheme)["weight"].float()
        torch.testing.assert_close(
            theirs, stands_for, rtol=1e-2 if form == "ct-nvfp4" else 1e-6, atol=1e-6
        )
