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
_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    "qwen35": lambda: _split(_MARKS),
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
    "qwen35": lambda: merging_tokenizer("qwen35"),
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
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
}
_DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 48}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
_HYBRID = {
    **_GRANITE,
    **_MAMBA_2,
    "layer_types": ["mamba", "attention"] * 2,
    "num_hidden_layers": 4,
    "shared_intermediate_size": 48,
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2", {**_LATENT, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", {**_LATENT, "n_group": 2, "topk_group": 1}),
    "deepseek_v3, yarn": (
        "DeepseekV3",
        {
            **_LATENT,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "glm4_moe_lite": ("Glm4MoeLite", {**_LATENT, "mlp_layer_types": ["dense", "sparse"]}),
    "glm4_moe": (
        "Glm4Moe",
        {
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "routed_scaling_factor": 1.7,
            "use_qk_norm": True,
        },
    ),
    "minimax_m2": ("MiniMaxM2", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "moe_intermediate_size": 32,
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 2,
        },
    ),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"head_dim": 16, "num_experts": 4, "moe_topk": 2}),
    "llama4_text": (
        "Llama4",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size_mlp": 80,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
        },
    ),
    "lfm2": ("Lfm2", {**_CONVOLUTIONS, "block_multiple_of": 32}),
    "lfm2_moe": ("Lfm2Moe", {**_CONVOLUTIONS, **_EXPERTS, "num_dense_layers": 1}),
    "falcon_h1": (
        "FalconH1",
        {
            **_MAMBA_2,
            "head_dim": 16,
            "mamba_d_ssm": 128,
            "mamba_rms_norm": True,
            "mamba_norm_before_gate": False,
            "attention_in_multiplier": 1.1,
            "attention_out_multiplier": 0.9,
            "key_multiplier": 0.8,
            "ssm_in_multiplier": 1.2,
            "ssm_out_multiplier": 0.7,
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 1.3],
            "mlp_multipliers": [0.9, 1.2],
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 1.5,
        },
    ),
    "granitemoehybrid": ("GraniteMoeHybrid", {**_HYBRID, "num_local_experts": 0}),
    "granitemoehybrid, experts": (
        "GraniteMoeHybrid",
        {**_HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granitemoehybrid, attention": (
        "GraniteMoeHybrid",
        {
            **_HYBRID,
            "num_local_experts": 0,
            "layer_types": ["attention"] * 4,
            "position_embedding_type": "rope",
        },
    ),
    "qwen3_next": ("Qwen3Next", {**_DELTA, **_SHARED}),
    "qwen3_5_text": ("Qwen3_5", {**_DELTA, "head_dim": 64}),
    "qwen3_5_moe_text": ("Qwen3_5Moe", {**_DELTA, **_SHARED, "head_dim": 64}),
    "ministral3": (
        "Ministral3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**_EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "gemma2": ("Gemma2", {**_LAYERS, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3", {**_LAYERS, "query_pre_attn_scalar": 16, "rope_parameters": _ROPES}),
    "phi3": ("Phi3", {}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {**_LAYERS, "rope_parameters": dict.fromkeys(_ROPES, _ROPE)}),
    "granite": ("Granite", _GRANITE),
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
    parts = ("Gemma3", "Llama4", "Qwen3_5", "Qwen3_5Moe")
    name = f"{kind}TextConfig" if kind in parts else f"{kind}Config"
    config = getattr(transformers, name)(**{**SIZES, **settings})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def with_pictures(kind: str, text: str, **values: Any) -> Any:
    """A model with a vision tower, whose language part is of a family above."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    qwen = {"num_heads": 2, "depth": 1, "out_hidden_size": 64, "num_position_embeddings": 16}
    vision = {**sizes, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**SIZES, **MORE[text][1]},
        vision_config={**sizes, **qwen} if "Qwen" in kind else vision,
        tie_word_embeddings=kind == "Gemma3",
        **values,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


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
    "gemma3": lambda: with_pictures("Gemma3", "gemma3_text", mm_tokens_per_image=1),
    "qwen3_5": lambda: with_pictures("Qwen3_5", "qwen3_5_text"),
    "glm": lambda: GlmForCausalLM(GlmConfig(**SIZES, head_dim=16, attention_bias=True)),
    "glm4": lambda: Glm4ForCausalLM(Glm4Config(**SIZES, head_dim=16, attention_bias=True)),
}
ADAPTED = {
    family: {"exclude_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]}
    for family in ("deepseek_v2", "deepseek_v3", "deepseek_v3, yarn", "glm4_moe_lite")
}
"""The fields of an adapter's configuration of families of which llama.cpp does not adapt all."""
UNREAD = ("glm", "glm4", "llama with biases", "llama 3", *MORE, "gemma3", "qwen3_5")
"""What transformers does not read from GGUF, or without biases or rotary factors."""


def save_family(folder: Path, family: str, tokenizer: str = "gpt-2") -> Path:
    """Writes a random model of the family, in float32; its norms and biases are random too."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
                ends = ("bias", "sinks", "A_log", ".D")
                assert "norm" in name or "ln_" in name or name.endswith(ends)
        for name, buffer in model.named_buffers():
            if name.endswith("_bias"):  # by which experts are chosen
                buffer.add_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    TOKENIZERS[tokenizer]().save_pretrained(folder)
    return folder
