"""Models whose attention a cache of rows carries, and those that plain `generate` computes."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV4Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
)

import layer_kinds
from answered import each_alone, tokens
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from matrix import few
from random_adapters import make_adapter
from tiny import byte_tokenizer

SIZES = layer_kinds.SIZES | {"num_hidden_layers": 2}
NAMES = {key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
GPT2 = {**NAMES, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
CARRIED: dict[str, PreTrainedConfig] = {
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None),
    "phi3": Phi3Config(**SIZES, sliding_window=None),
    "gpt2": GPT2Config(**GPT2, n_positions=128),
    "opt": OPTConfig(
        **NAMES,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        init_std=0.2,
    ),
    "gpt neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}
NOT_CARRIED: dict[str, tuple[PreTrainedConfig, str]] = {
    "deepseek v4": (
        DeepseekV4Config(
            **SIZES,
            head_dim=8,
            q_lora_rank=12,
            num_experts_per_tok=2,
            n_routed_experts=4,
            moe_intermediate_size=8,
            hc_mult=2,
            sliding_window=4,
            o_groups=2,
            o_lora_rank=4,
            index_n_heads=16,
            index_head_dim=8,
            index_topk=4,
            layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
            compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        ),
        "its layers keep their past as DeepseekV4",
    ),
    "recurrent gemma": (
        RecurrentGemmaConfig(**SIZES, lru_width=32, block_types=["recurrent", "attention"]),
        "it returns no cache",
    ),
}
PROMPTS = [[3], list(range(40, 70)), list(range(90, 101)), [9, 8, 7, 6, 5]]
WHO = ["a", "b", None, "a"]


def save(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def answered(folder: Path, tmp_path: Path) -> tuple[list[str], list[list[int]], list[list[int]]]:
    """The engine's notices, its answers, and those of every adapter alone."""
    adapters = {name: make_adapter(folder, tmp_path / name, seed) for seed, name in enumerate("ab")}
    engine = open_engine(str(folder), adapters, dtype="float32", max_rows=3)
    try:
        sampling = Sampling(max_new_tokens=12, logprobs=0)
        tickets = [
            engine.submit(ids, name, sampling) for ids, name in zip(PROMPTS, WHO, strict=True)
        ]
        found = [tokens(ticket) for ticket in tickets]
    finally:
        engine.close()
    expected = each_alone(folder, adapters, zip(PROMPTS, WHO, strict=True), 12)
    return engine.notices, found, expected


@pytest.mark.parametrize("family", few(list(CARRIED), "llama, tied", "gpt2"))
def test_a_model_of_plain_attention_is_computed_row_by_row(family: str, tmp_path: Path):
    notices, found, expected = answered(save(CARRIED[family], tmp_path / "base"), tmp_path)
    assert notices == []
    assert found == expected


@pytest.mark.parametrize("family", few(list(NOT_CARRIED), "deepseek v4"))
def test_another_model_is_computed_by_generate_and_says_why(family: str, tmp_path: Path):
    config, reason = NOT_CARRIED[family]
    notices, found, expected = answered(save(config, tmp_path / "base"), tmp_path)
    assert len(notices) == 1
    assert "is computed by transformers' generate (" in notices[0]
    assert reason in notices[0]
    assert found == expected


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MIXTURES: dict[str, PreTrainedConfig] = {
    "mixtral": CARRIED["mixtral"],
    "gpt-oss, stored (in, out)": GptOssConfig(**SIZES, num_local_experts=4, head_dim=8),
}


@pytest.mark.parametrize("config", few(MIXTURES, "gpt-oss, stored (in, out)"))
def test_adapters_of_experts_answer_beside_others(config: PreTrainedConfig, tmp_path: Path):
    base = save(config, tmp_path / "base")
    kinds: dict[str, dict[str, Any]] = {
        "experts": {"target_modules": [], "target_parameters": EXPERTS},
        "both": {
            "target_modules": ["q_proj"],
            "target_parameters": [EXPERTS[1], "o_proj.weight"],
            "rank_pattern": {"experts.down_proj": 2},
        },
        "attention": {"target_modules": ["q_proj", "v_proj"]},
    }
    folders = {
        name: make_adapter(base, tmp_path / name, seed, r=3, **kind)
        for seed, (name, kind) in enumerate(kinds.items())
    }
    everyone = [*product([*folders, None], range(len(PROMPTS)))]
    answers = each_alone(base, folders, ((PROMPTS[at], who) for who, at in everyone), 8)
    expected = dict(zip(everyone, answers, strict=True))
    assert len({str(tokens) for tokens in expected.values()}) > 12
    engine = open_engine(str(base), folders, dtype="float32", max_rows=4)
    try:
        for turn in range(4):
            who = [*folders, None][turn:] + [*folders, None][:turn]
            sampling = Sampling(max_new_tokens=8, logprobs=0)
            asked = [engine.submit(p, w, sampling) for p, w in zip(PROMPTS, who, strict=True)]
            for at, (name, ticket) in enumerate(zip(who, asked, strict=True)):
                assert tokens(ticket) == expected[name, at]
        engine.pool.unregister("experts")
        assert tokens(engine.submit(PROMPTS[1], None, sampling)) == expected[None, 1]
    finally:
        engine.close()
