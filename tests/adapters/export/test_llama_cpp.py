"""llama.cpp itself answers as base + adapter do here, with either of the two GGUF forms."""

import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoTokenizer

from gguf_models import FAMILIES, TEXTS, TOKENIZERS, save_family
from lorakit.adapters.export.gguf_files import export_gguf_adapter, export_gguf_model, write_gguf
from lorakit.adapters.open import open_adapter
from lorakit.models.names import resolve
from plain_adapters import save_adapter

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed (pip builds it, in minutes)"
)

_TOKENS = 12


def answers(model: Path, adapter: Path | None, prompts: list[str]) -> list[Any]:
    """What llama.cpp reads and writes, greedily: token numbers of each prompt and answer."""
    engine = llama_cpp.Llama(
        str(model),
        lora_path=adapter and str(adapter),
        n_ctx=256,
        n_threads=1,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        flash_attn=False,
        verbose=False,
    )
    found = []
    for prompt in prompts:
        ids = engine.tokenize(prompt.encode(), add_bos=False, special=True)
        engine.reset()
        stream = engine.generate(ids, temp=0.0, repeat_penalty=1.0)
        found.append((ids, [token for token, _ in zip(stream, range(_TOKENS), strict=False)]))
    engine.close()
    return found


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_of_every_family(family: str, tmp_path: Path):
    base = save_family(tmp_path / "base", family)
    adapter = save_adapter(
        base, tmp_path / "adapter", r=3, lora_alpha=5, target_modules="all-linear"
    )
    compare(base, adapter, tmp_path, list(TEXTS))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_kind_of_tokenizer_reads_the_same_tokens(kind: str, tmp_path: Path):
    base = save_family(tmp_path / "base", "llama", kind)
    write_gguf(base, tmp_path / "base.gguf", "float32", "base")
    engine = llama_cpp.Llama(str(tmp_path / "base.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(base)
    more = ["  two  spaces\n\n\nand 3.14, 2026 don't WE'LL", "a", "\t\tx = y[1:2]\r\n", "éÀ කාල"]
    for text in (*TEXTS, *more):
        assert engine.tokenize(text.encode(), special=True) == tokenizer(text).input_ids
    engine.close()


def test_q8_0_is_what_llama_cpp_itself_makes_of_the_float32_file(tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    write_gguf(base, tmp_path / "wide.gguf", "float32", "base")
    write_gguf(base, tmp_path / "ours.gguf", "q8_0", "base")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    wide, theirs = (str(tmp_path / name).encode() for name in ("wide.gguf", "theirs.gguf"))
    assert llama_cpp.llama_model_quantize(wide, theirs, ctypes.byref(settings)) == 0
    own, other = (
        {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}
        for path in (tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    )
    assert own == other


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
