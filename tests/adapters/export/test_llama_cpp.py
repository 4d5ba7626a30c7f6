"""llama.cpp itself answers as base + adapter do here, with either of the two GGUF forms."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gguf_models import ADAPTED, FAMILIES, SIZES, TEXTS, TOKENIZERS, merging_tokenizer, save_family
from llama_cpp_server import its_quantized, running
from lorakit.adapters.export.gguf_files import export_gguf_adapter, export_gguf_model, write_gguf
from lorakit.adapters.export.k_quants import quantized
from lorakit.adapters.open import open_adapter
from lorakit.models.names import resolve
from matrix import few
from plain_adapters import save_adapter

_TOKENS = 12
CHECKED = ("llama, tied", "gpt_oss", "deepseek_v3", "qwen3_5_text")


def answers(model: Path, adapter: Path | None, prompts: list[str]) -> list[Any]:
    """What llama.cpp reads and writes, greedily: token numbers of each prompt and answer."""
    with running(model, adapter) as engine:
        read = [engine.tokens(prompt) for prompt in prompts]
        return [(ids, engine.answer(ids, _TOKENS)) for ids in read]


def ours(adapter: Path, prompts: list[str]) -> list[Any]:
    opened = open_adapter(adapter, dtype="float32")
    found = []
    for prompt in prompts:
        ids = opened.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            answer = opened.model.generate(
                input_ids=ids, max_new_tokens=_TOKENS, do_sample=False, eos_token_id=None
            )
        found.append((ids[0].tolist(), answer[0, ids.shape[1] :].tolist()))
    return found


def compare(base: Path, adapter: Path, folder: Path, prompts: list[str]) -> None:
    export_gguf_adapter(adapter, folder / "adapter.gguf")
    export_gguf_model(adapter, folder / "merged.gguf", dtype="float32")
    write_gguf(base, folder / "base.gguf", "float32", "base")
    expected = ours(adapter, prompts)
    assert answers(folder / "merged.gguf", None, prompts) == expected
    assert answers(folder / "base.gguf", folder / "adapter.gguf", prompts) == expected
    assert answers(folder / "base.gguf", None, prompts) != expected


@pytest.mark.parametrize("family", few(list(FAMILIES), *CHECKED))
def test_a_tiny_model_of_every_family(family: str, tmp_path: Path):
    base = save_family(tmp_path / "base", family)
    adapted = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **ADAPTED.get(family, {})}
    adapter = save_adapter(base, tmp_path / "adapter", **adapted)
    compare(base, adapter, tmp_path, list(TEXTS))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_kind_of_tokenizer_reads_the_same_tokens(kind: str, tmp_path: Path):
    base = save_family(tmp_path / "base", "llama", kind)
    write_gguf(base, tmp_path / "base.gguf", "float32", "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    more = ["  two  spaces\n\n\nand 3.14, 2026 don't WE'LL", "a", "\t\tx = y[1:2]\r\n", "éÀ කාල"]
    with running(tmp_path / "base.gguf") as engine:
        for text in (*TEXTS, *more):
            assert engine.tokens(text, add_special=True) == tokenizer(text).input_ids


@pytest.mark.parametrize("form", ["Q8_0", "Q5_1", "Q5_0", "Q4_0", "Q6_K", "Q5_K", "Q4_K"])
def test_weights_are_rounded_as_llama_cpp_itself_rounds_them(form: str):
    kind = gguf.GGMLQuantizationType[form]
    torch.manual_seed(0)
    values = torch.randn(32, 512) * torch.randn(32, 512).exp()
    values[::5] = values[::5].abs()
    values[::7, 100:300] = 0
    values[3] = 0
    theirs, own = its_quantized(values.numpy(), kind), quantized(values, kind)
    assert own.shape == theirs.shape
    if not form.endswith("K"):
        assert np.array_equal(own, theirs)
        return
    # Sums in another order choose another of two roundings that are as good.
    assert (own == theirs).mean() > 0.96
    error, least = (
        np.square(gguf.dequantize(packed, kind) - values.numpy()).sum() for packed in (own, theirs)
    )
    assert error < least * 1.003


MIXTURES = {
    "q8_0": {"Q8_0"},
    "q6_k": {"Q6_K", "Q8_0"},
    "Q5_K_M": {"Q5_K", "Q6_K", "Q5_1"},
    "q4_k_m": {"Q4_K", "Q6_K", "Q5_0"},
    "q4_0": {"Q4_0", "Q6_K"},
}


@pytest.mark.parametrize("dtype", few(list(MIXTURES), "q4_k_m"))
def test_mixtures_are_read_and_computed_with_by_llama_cpp(dtype: str, tmp_path: Path):
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 288, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "initializer_range": 0.08}))
    model.save_pretrained(tmp_path / "base")
    merging_tokenizer().save_pretrained(tmp_path / "base")
    report = write_gguf(tmp_path / "base", tmp_path / "packed.gguf", dtype, "base")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "packed.gguf").tensors}
    found = {t.tensor_type.name for t in stored.values() if len(t.shape) == 2}
    assert MIXTURES[dtype] <= found
    narrow = dtype.lower() in ("q6_k", "q5_k_m", "q4_k_m")  # rows of 288 are not of 256
    assert [("288" in n or "256 values" in n) for n in report.notices] == [True] * narrow
    # The very weights that the file stands for, in transformers' model.
    write_gguf(tmp_path / "base", tmp_path / "wide.gguf", "float32", "base")
    wide = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "wide.gguf").tensors}
    rounded = write_rounded(tmp_path, stored, wide)
    ids = AutoTokenizer.from_pretrained(tmp_path / "base")(TEXTS[0]).input_ids
    with running(tmp_path / "packed.gguf") as engine:
        packed = engine.logprobs(ids, 320)
    with running(rounded) as engine:
        unpacked = engine.logprobs(ids, 320)
    # llama.cpp rounds the inputs of such products to 8 bits.
    assert np.abs(packed - unpacked).mean() < 0.06


@pytest.mark.parametrize("family", few(["qwen3_moe", "gpt_oss"], "gpt_oss"))
def test_stacked_experts_are_rounded_too(family: str, tmp_path: Path):
    base = save_family(tmp_path / "base", family)
    write_gguf(base, tmp_path / "wide.gguf", "float32", "base")
    write_gguf(base, tmp_path / "packed.gguf", "q8_0", "base")
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "packed.gguf").tensors}
    assert stored["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q8_0"
    assert stored["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    wide = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "wide.gguf").tensors}
    rounded = write_rounded(tmp_path, stored, wide)
    # Few tokens: rounded inputs soon lead a random router to other experts.
    ids = AutoTokenizer.from_pretrained(base)(TEXTS[0]).input_ids[:8]
    with running(tmp_path / "packed.gguf") as engine:
        packed = engine.logprobs(ids, 320)
    with running(rounded) as engine:
        assert np.abs(packed - engine.logprobs(ids, 320)).mean() < 0.1


def write_rounded(folder: Path, stored: dict[str, Any], wide: dict[str, Any]) -> Path:
    """`wide.gguf` in `folder` again, with the values that the `stored` tensors stand for."""
    data = bytearray((folder / "wide.gguf").read_bytes())
    for tensor in gguf.GGUFReader(folder / "wide.gguf").tensors:
        packed = stored[tensor.name]
        values = gguf.dequantize(packed.data, packed.tensor_type).astype(np.float32)
        assert values.nbytes == wide[tensor.name].nbytes
        data[tensor.data_offset : tensor.data_offset + values.nbytes] = values.tobytes()
    (folder / "rounded.gguf").write_bytes(data)
    return folder / "rounded.gguf"


@pytest.mark.exhaustive
def test_the_bundled_model_with_ranks_and_rslora(tmp_path: Path):
    alias = "smollm2-135m-instruct"
    adapter = save_adapter(
        alias,
        tmp_path / "adapter",
        r=8,
        lora_alpha=1,
        use_rslora=True,
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={"k_proj": 5},
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == alias
    prompts = ["The capital of France is", "def mean(values):\n", "1 + 1 = 2, 2 + 2 ="]
    compare(resolve(alias).path, adapter, tmp_path, prompts)
