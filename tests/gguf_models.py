"""Tiny models of every family that lorakit writes as GGUF, with a tokenizer that has merges."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tiny import CHATML

TEXTS = (
    "The capital of France is Paris, and the river there is the Seine.",
    "We'd rather say: it's 12345 times as much!\n\n  def f(x):\n\treturn x",
    "低秩适配 🦙 — naïve façade, Русский текст, ελληνικά",
)

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = _TEKKEN.replace("]+|[^", "]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^").replace(
    "]*|\\p{N}", "]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}"
)
RULES: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(True)]
    ),
    "qwen2": lambda: _split(_WORDS.replace("{1,3}", "")),
    "dbrx": lambda: _split(_WORDS),
    "tekken": lambda: _split(_TEKKEN),
    "gpt-4o": lambda: _split(_O200K),
}
"""Rules that cut text into words."""


def _byte_level(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(expression: str) -> Any:
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([split, _byte_level(False)])


def merging_tokenizer(rule: str = "gpt-2", **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 tokens, learned from `TEXTS`."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = RULES[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|user|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE over characters with bytes for those it lacks, as SentencePiece makes for Llama 2."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXTS[:2], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*first, *sorted(learned["vocab"], key=learned["vocab"].get)]
    model = models.BPE(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """The same as Gemma has it, in a tokenizer.json alone: no space is put in front."""
    made = json.loads(piece_tokenizer().backend_tokenizer.to_str())
    made["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    made["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    made["decoder"]["decoders"] = made["decoder"]["decoders"][:-1]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: merging_tokenizer("gpt-2"),
    "smollm": lambda: merging_tokenizer("smollm"),
    "qwen2": lambda: merging_tokenizer("qwen2"),
    "dbrx": lambda: merging_tokenizer("dbrx"),
    "llama-bpe": lambda: merging_tokenizer("dbrx", ignore_merges=True),
    "tekken": lambda: merging_tokenizer("tekken", ignore_merges=True),
    "gpt-4o": lambda: merging_tokenizer("gpt-4o"),
    "default": piece_tokenizer,
    "gemma": gemma_tokenizer,
}
"""A tokenizer of every kind, by llama.cpp's name for the rule that cuts its words."""


SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LAYERS = {"num_hidden_layers": 7, "sliding_window": 8, "head_dim": 16}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPES = {"sliding_attention": _ROPE, "full_attention": {**_ROPE, "rope_theta": 50000.0}}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "gemma2": ("Gemma2", {**_LAYERS, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3", {**_LAYERS, "query_pre_attn_scalar": 16, "rope_parameters": _ROPES}),
    "phi3": ("Phi3", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {**_LAYERS, "rope_parameters": dict.fromkeys(_ROPES, _ROPE)}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 2.0,
        },
    ),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 16}),
    "qwen3, yarn": (
        "Qwen3",
        {
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **_LAYERS,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": _ROPE,
        },
    ),
}
"""Further families: the beginnings of their classes' names, and settings beside `SIZES`."""


def _made(kind: str, settings: dict[str, Any]) -> Any:
    name = {"Gemma3": "Gemma3TextConfig"}.get(kind, f"{kind}Config")
    config = getattr(transformers, name)(**{**SIZES, **settings})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama with biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
    ),
    "llama 3": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=_LLAMA3)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, head_dim=32, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=128)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=320,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=1024,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=2,
        )
    ),
    **{name: partial(_made, *made) for name, made in MORE.items()},
    "glm": lambda: GlmForCausalLM(GlmConfig(**SIZES, head_dim=16, attention_bias=True)),
    "glm4": lambda: Glm4ForCausalLM(Glm4Config(**SIZES, head_dim=16, attention_bias=True)),
}
UNREAD = ("glm", "glm4", "llama with biases", "llama 3", *MORE)
"""What transformers does not read from GGUF, or without biases or rotary factors."""


def save_family(folder: Path, family: str, tokenizer: str = "gpt-2") -> Path:
    """Writes a random model of the family, in float32; its norms and biases are random too."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
                assert "norm" in name or "ln_" in name or name.endswith(("bias", "sinks"))
    model.save_pretrained(folder)
    TOKENIZERS[tokenizer]().save_pretrained(folder)
    return folder
