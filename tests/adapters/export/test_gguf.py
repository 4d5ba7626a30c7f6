"""GGUF files read back are what was exported, and whoever knows the format computes the same."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from gguf_models import ADAPTED, FAMILIES, TEXTS, TOKENIZERS, UNREAD, merging_tokenizer, save_family
from lorakit.adapters.export.gguf_files import export_gguf_adapter, export_gguf_model, write_gguf
from lorakit.adapters.open import open_adapter
from lorakit.errors import InputError
from lorakit.models.layouts.gguf_file import GGUFFile
from matrix import few
from plain_adapters import KINDS, save_adapter

ALL = {"target_modules": "all-linear", "r": 3, "lora_alpha": 5}


USUAL = ("llama, tied", "qwen3", "gpt2")


@pytest.fixture(scope="module", params=few(list(FAMILIES), *USUAL))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("base"), family)


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a GGUF file as float32, in numpy's order of dimensions."""
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist())
        for t in gguf.GGUFReader(path).tensors
    }


def value(path: Path, key: str) -> Any:
    field = gguf.GGUFReader(path).get_field(key)
    assert field is not None, key
    return field.contents()


def test_transformers_loads_the_merged_file_and_computes_the_same(
    family: str, base: Path, tmp_path: Path
):
    if family in UNREAD:
        pytest.skip(f"transformers does not read all of {family} from GGUF")
    adapter = save_adapter(base, tmp_path / "adapter", **ALL)
    export_gguf_model(adapter, tmp_path / "model.gguf", dtype="float32")
    opened = open_adapter(adapter, dtype="float32")
    file = GGUFFile(tmp_path / "model.gguf")
    model = file.model("AutoModelForCausalLM", dtype="float32")
    tokenizer = file.tokenizer()
    for text in TEXTS:
        ids = opened.tokenizer(text, return_tensors="pt").input_ids
        assert tokenizer(text).input_ids == ids[0].tolist()
        with torch.no_grad():
            found, expected = model(input_ids=ids).logits, opened.model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_base_file_and_adapter_file_add_up_to_the_merged_file(
    family: str, base: Path, tmp_path: Path
):
    adapter = save_adapter(base, tmp_path / "adapter", **ALL, **ADAPTED.get(family, {}))
    report = export_gguf_adapter(adapter, tmp_path / "adapter.gguf")
    export_gguf_model(adapter, tmp_path / "merged.gguf", dtype="float32")
    write_gguf(base, tmp_path / "base.gguf", "float32", "base")
    pairs, weights = tensors(tmp_path / "adapter.gguf"), tensors(tmp_path / "base.gguf")
    merged = tensors(tmp_path / "merged.gguf")
    alpha = value(tmp_path / "adapter.gguf", "adapter.lora.alpha")
    assert weights.keys() == merged.keys()
    assert report.tensors == len(pairs) > 0
    changed = 0
    for name, weight in weights.items():
        if f"{name}.lora_a" in pairs:
            A, B = pairs.pop(f"{name}.lora_a"), pairs.pop(f"{name}.lora_b")
            weight = weight + alpha / A.shape[0] * B @ A  # llama.cpp's formula
            changed += 1
        np.testing.assert_allclose(merged[name], weight, rtol=1e-4, atol=1e-5)
    assert not pairs
    assert changed == report.tensors / 2


@pytest.mark.parametrize("kind", few(list(KINDS), "patterns"))
def test_scaling_is_right_whatever_it_was_made_of(kind: str, tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter", **KINDS[kind])
    export_gguf_adapter(adapter, tmp_path / "adapter.gguf")
    export_gguf_model(adapter, tmp_path / "merged.gguf", dtype="float32")
    write_gguf(base, tmp_path / "base.gguf", "float32", "base")
    pairs, weights = tensors(tmp_path / "adapter.gguf"), tensors(tmp_path / "base.gguf")
    merged = tensors(tmp_path / "merged.gguf")
    alpha = value(tmp_path / "adapter.gguf", "adapter.lora.alpha")
    for name in {name.removesuffix(".lora_a").removesuffix(".lora_b") for name in pairs}:
        A, B = pairs[f"{name}.lora_a"], pairs[f"{name}.lora_b"]
        expected = merged[name] - weights[name]
        np.testing.assert_allclose(alpha / A.shape[0] * B @ A, expected, rtol=1e-3, atol=1e-4)


def test_an_embedding_and_a_head_of_their_own_are_adapted(tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    ends = {"target_modules": ["embed_tokens", "lm_head"], "r": 3}
    export_gguf_adapter(save_adapter(base, tmp_path / "adapter", **ends), tmp_path / "a.gguf")
    shapes = {name: tensor.shape for name, tensor in tensors(tmp_path / "a.gguf").items()}
    assert shapes == {
        "token_embd.weight.lora_a": (320, 3),  # rows are taken out of it
        "token_embd.weight.lora_b": (64, 3),
        "output.weight.lora_a": (3, 64),
        "output.weight.lora_b": (320, 3),
    }
    tied = save_family(tmp_path / "tied", "llama, tied")
    with pytest.raises(InputError, match=r"one weight as embedding.*--merged"):
        export_gguf_adapter(save_adapter(tied, tmp_path / "b", **ends), tmp_path / "b.gguf")


def test_the_adapter_file_says_what_it_is(tmp_path: Path):
    base = save_family(tmp_path / "base", "qwen3")
    export_gguf_adapter(save_adapter(base, tmp_path / "adapter", **ALL), tmp_path / "a.gguf")
    found = {
        key: value(tmp_path / "a.gguf", key)
        for key in ("general.type", "adapter.type", "general.architecture", "general.name")
    }
    assert found == {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": "qwen3",
        "general.name": "adapter",
    }


def test_the_model_file_has_the_tokenizer(tmp_path: Path):
    base = save_family(tmp_path / "base", "glm4")
    path = tmp_path / "base.gguf"
    write_gguf(base, path, "float16", "base")
    own = AutoTokenizer.from_pretrained(base)
    tokens = value(path, "tokenizer.ggml.tokens")
    assert {token: number for number, token in enumerate(tokens)} == own.get_vocab()
    types = value(path, "tokenizer.ggml.token_type")
    control = [tokens[i] for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    assert control == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>"]
    assert types.count(gguf.TokenType.NORMAL) == len(tokens) - 4
    assert value(path, "tokenizer.ggml.bos_token_id") == 0
    assert value(path, "tokenizer.ggml.eos_token_id") == 2
    assert value(path, "tokenizer.ggml.eot_token_id") == 3
    assert value(path, "tokenizer.ggml.pre") == "gpt-2"
    assert value(path, "tokenizer.chat_template") == own.chat_template
    assert value(path, "tokenizer.ggml.add_bos_token") is False
    assert value(path, "glm4.rope.dimension_count") == 8
    assert value(path, "glm4.block_count") == 2


@pytest.mark.parametrize("rule", TOKENIZERS)
def test_the_rule_that_cuts_words_is_known_by_llama_cpps_name(rule: str, tmp_path: Path):
    base = save_family(tmp_path / "base", "llama", rule)
    write_gguf(base, tmp_path / "base.gguf", "float32", "base")
    pieces = rule in ("default", "gemma")
    assert value(tmp_path / "base.gguf", "tokenizer.ggml.pre") == ("default" if pieces else rule)
    kind = "llama" if pieces else "gpt2"
    assert value(tmp_path / "base.gguf", "tokenizer.ggml.model") == kind


def test_pieces_have_scores_bytes_and_a_space_in_front(tmp_path: Path):
    base = save_family(tmp_path / "base", "llama", "default")
    path = tmp_path / "base.gguf"
    write_gguf(base, path, "float32", "base")
    tokens = value(path, "tokenizer.ggml.tokens")
    types = value(path, "tokenizer.ggml.token_type")
    scores = dict(zip(tokens, value(path, "tokenizer.ggml.scores"), strict=True))
    assert types[0] == gguf.TokenType.UNKNOWN
    assert types[3:259] == [gguf.TokenType.BYTE] * 256
    assert types.count(gguf.TokenType.UNUSED) == 320 - len(AutoTokenizer.from_pretrained(base))
    merges = json.loads((base / "tokenizer.json").read_text())["model"]["merges"]
    assert [scores["".join(pair)] for pair in merges[:3]] == [0, -1, -2]
    assert value(path, "tokenizer.ggml.add_space_prefix") is True
    assert value(path, "tokenizer.ggml.add_bos_token") is True


def test_a_rule_without_a_known_name_is_refused(tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save_pretrained(base)
    with pytest.raises(InputError, match="by a rule that lorakit has no"):
        write_gguf(base, tmp_path / "base.gguf", "float32", "base")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("q8_0", "Q8_0")])
def test_rounded_files_stay_near_and_vectors_stay_float32(dtype: str, kind: str, tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    write_gguf(base, tmp_path / "wide.gguf", "float32", "base")
    report = write_gguf(base, tmp_path / "base.gguf", dtype, "base")
    assert report.bytes < (tmp_path / "wide.gguf").stat().st_size * 0.6
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "base.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == kind
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    wide, narrow = tensors(tmp_path / "wide.gguf"), tensors(tmp_path / "base.gguf")
    for name, weight in wide.items():
        error = np.abs(narrow[name] - weight).max() / np.abs(weight).max()
        assert error < 0.01, name


def test_what_an_adapter_file_cannot_hold_the_merged_file_can(tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    adapter = save_adapter(
        base, tmp_path / "adapter", r=2, target_modules="all-linear", use_dora=True
    )
    with pytest.raises(InputError, match="DoRA"):
        export_gguf_adapter(adapter, tmp_path / "a.gguf")
    export_gguf_model(adapter, tmp_path / "m.gguf", dtype="float32")
    file = GGUFFile(tmp_path / "m.gguf")
    model = file.model("AutoModelForCausalLM", dtype="float32")
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        expected = open_adapter(adapter, dtype="float32").model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_an_architecture_without_a_known_form_is_refused_with_those_that_have_one(tmp_path: Path):
    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "base")
    merging_tokenizer().save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", r=2)
    for export in (export_gguf_adapter, export_gguf_model):
        with pytest.raises(InputError, match=r"gpt_neox model.*llama, mistral, qwen2, qwen3"):
            export(adapter, tmp_path / "a.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_outputs_that_cannot_be_written_are_said_before_anything_is_read(tmp_path: Path):
    (tmp_path / "there.gguf").write_text("mine")
    for export in (export_gguf_adapter, export_gguf_model):
        with pytest.raises(InputError, match="already exists"):
            export(tmp_path / "nowhere", tmp_path / "there.gguf")
        with pytest.raises(InputError, match=r"ends in \.gguf"):
            export(tmp_path / "nowhere", tmp_path / "there.bin")
        with pytest.raises(InputError, match="--dtype"):
            export(tmp_path / "nowhere", tmp_path / "a.gguf", dtype="int4")
    assert (tmp_path / "there.gguf").read_text() == "mine"


def test_an_adapter_of_more_layers_than_its_base_is_refused(tmp_path: Path):
    base = save_family(tmp_path / "base", "llama")
    adapter = save_adapter(base, tmp_path / "adapter", **ALL)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    model.save_pretrained(tmp_path / "short")
    with pytest.raises(InputError, match=r"layers\.1\..*another base model"):
        export_gguf_adapter(adapter, tmp_path / "a.gguf", base=str(tmp_path / "short"))
