"""A merge file by file has the bytes of one in memory, and is PEFT's, for every kind of layer."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import lorakit
from families import (
    make_gpt2,
    make_gpt_oss,
    make_llama,
    make_mixtral,
    make_t5,
    make_tied,
    wrap,
)
from tiny import byte_tokenizer

LINEAR: dict[str, Any] = {"target_modules": "all-linear", "r": 4}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}
SMALL = {"target_modules": ["v_proj"], "r": 2}

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (make_llama, LINEAR),
    "rsLoRA": (make_llama, {**LINEAR, "use_rslora": True, "lora_alpha": 5}),
    "patterns": (make_llama, {**LINEAR, **PATTERNS}),
    "DoRA": (make_llama, {**LINEAR, "use_dora": True}),
    "lora_bias": (make_llama, {**LINEAR, "lora_bias": True}),
    "bias of adapted layers": (make_llama, {**LINEAR, "bias": "lora_only"}),
    "all biases": (make_llama, {**SMALL, "bias": "all"}),
    "all biases and lora_bias": (make_llama, {**SMALL, "bias": "all", "lora_bias": True}),
    "saved module": (make_llama, {**SMALL, "modules_to_save": ["o_proj", "lm_head"]}),
    "embedding": (make_llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, DoRA": (make_llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "head": (make_llama, {"target_modules": ["lm_head", "q_proj"]}),
    "tokens": (make_llama, {**SMALL, "trainable_token_indices": [3, 7]}),
    "PiSSA": (make_llama, {**LINEAR, "init_lora_weights": "pissa"}),
    "Conv1D": (make_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "Conv1D, DoRA": (make_gpt2, {"target_modules": ["c_attn"], "use_dora": True}),
    "position embedding": (make_gpt2, {"target_modules": ["wpe", "c_attn"]}),
    "tied, apart": (make_tied, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, head": (make_tied, {"target_modules": ["lm_head", "q_proj"]}),
    "tied, both": (make_tied, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied tokens": (make_tied, {**SMALL, "trainable_token_indices": [3, 7]}),
    "tied, saved": (make_tied, {**SMALL, "modules_to_save": ["lm_head"]}),
    "experts (in, out)": (make_gpt_oss, {**SMALL, "target_parameters": ["mlp.experts.down_proj"]}),
    "two parameters": (
        make_gpt_oss,
        {**SMALL, "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
    ),
    "beside experts": (make_mixtral, {"target_modules": ["q_proj", "v_proj"]}),
    "encoder and decoder": (make_t5, {"target_modules": ["q", "v", "wo"]}),
}
LOADED = {
    "experts (out, in)": (make_mixtral, {**SMALL, "target_parameters": ["experts.down_proj"]})
}


def save_base(model: nn.Module, folder: Path, dtype: torch.dtype, shard: str = "8KB") -> Path:
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, fields: dict[str, Any], seed: int = 3) -> Path:
    """An adapter on the model in `base`, all of whose tensors are random."""
    kind = AutoModelForSeq2SeqLM if is_t5(base) else AutoModelForCausalLM
    task = "SEQ_2_SEQ_LM" if is_t5(base) else "CAUSAL_LM"
    model = kind.from_pretrained(base, dtype=torch.float32)
    random = {} if "init_lora_weights" in fields else {"init_lora_weights": False}
    ours = wrap(model, seed, task_type=task, **{**random, **fields})
    with torch.no_grad():
        for tensor in ours.adapter_tensors("default").values():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    ours.save_pretrained(folder)
    return folder


def is_t5(base: Path) -> bool:
    return '"t5"' in (base / "config.json").read_text()


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bytes(one: Path, two: Path) -> None:
    a, b = tensors_in(one), tensors_in(two)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(autouse=True)
def _quietly() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_layer_is_merged_to_the_same_bytes_as_in_memory(
    case: str, dtype: torch.dtype, tmp_path: Path
):
    make, fields = CASES[case]
    torch.manual_seed(1)
    base = save_base(make(), tmp_path / "base", dtype)
    adapter = save_adapter(base, tmp_path / "adapter", fields)
    before = {path: path.read_bytes() for path in base.iterdir()}
    streamed = lorakit.merge(adapter, tmp_path / "streamed", verify=False)
    loaded = lorakit.merge(adapter, tmp_path / "loaded", verify=False, in_memory=True)
    assert streamed.streamed, streamed.notices
    assert not loaded.streamed
    same_bytes(tmp_path / "streamed", tmp_path / "loaded")
    assert streamed.modules == loaded.modules
    assert streamed.survived == pytest.approx(loaded.survived, rel=1e-3)
    assert {path: path.read_bytes() for path in base.iterdir()} == before


# PEFT adds to the one weight that both have: its merged head changes unasked, or twice.
APART = {"tied, apart", "tied, head", "tied, both"}


@pytest.mark.parametrize("case", [case for case in [*CASES, *LOADED] if case not in APART])
def test_in_float32_every_merge_is_pefts(case: str, tmp_path: Path):
    make, fields = (CASES | LOADED)[case]
    torch.manual_seed(1)
    base = save_base(make(), tmp_path / "base", torch.float32)
    adapter = save_adapter(base, tmp_path / "adapter", fields)
    report = lorakit.merge(adapter, tmp_path / "merged", verify=False)
    assert report.streamed is (case in CASES)
    kind = AutoModelForSeq2SeqLM if is_t5(base) else AutoModelForCausalLM
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(base), adapter)
    state = theirs.merge_and_unload().state_dict()
    ours = kind.from_pretrained(tmp_path / "merged").state_dict()
    assert ours.keys() == state.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, state[key], rtol=1e-5, atol=1e-6, msg=key)
