"""Tiny configurations of families whose layers keep their past in different ways."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

WINDOW = 8
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
HALF_SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
GEMMA = {**HALF_SLIDING, "head_dim": 8}
SHARED = {
    **GEMMA,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 259,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
INDEXED = {**DEEPSEEK, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 6}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
CONVOLUTIONS = {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"] * 2}

FAMILIES: dict[str, dict[str, Any]] = {
    # Sliding windows: in all layers, in some, with softcapping, with sinks, with shared keys.
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "gemma2": {**GEMMA, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**GEMMA, "query_pre_attn_scalar": 8},
    "gemma3n_text": {
        **SHARED,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": None,
    },
    "gemma4_text": {**SHARED, "global_head_dim": 16},
    "gpt_oss": {**GEMMA, **EXPERTS},
    "ministral": GEMMA,
    "olmo3": HALF_SLIDING,
    "cohere2": HALF_SLIDING,
    "exaone4": HALF_SLIDING,
    # Chunks.
    "llama4_text": {
        "head_dim": 8,
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "no_rope_layers": [1, 0, 1, 0],
        "floor_scale": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
    },
    # Latent attention, and with an indexer.
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "minicpm3": {key: value for key, value in DEEPSEEK.items() if "experts" not in key},
    "deepseek_v32": INDEXED,
    "glm_moe_dsa": INDEXED,
    # Linear attention.
    "qwen3_next": {**DELTA, **QWEN_EXPERTS},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **QWEN_EXPERTS},
    "olmo_hybrid": DELTA,
    "kimi_linear": {
        **DEEPSEEK,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "linear_attn_config": {
            "full_attn_layers": [2, 4],
            "kda_layers": [1, 3],
            "head_dim": 8,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
    },
    "minimax": {
        "head_dim": 8,
        "num_local_experts": 4,
        "block_size": WINDOW,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    # Mamba beside attention, in one layer with it, alone; convolutions.
    "granitemoehybrid": {
        **MAMBA2,
        **EXPERTS,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 32,
    },
    "bamba": {**MAMBA2, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**MAMBA2, "head_dim": 8, "mamba_d_ssm": 64},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "head_dim": 8,
        "layers_block_type": ["mamba", "attention", "moe", "mamba"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "zamba2": {
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid"] * 2,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {
        "state_size": 8,
        "head_dim": 8,
        "num_heads": 8,
        "n_groups": 1,
        "expand": 2,
        "chunk_size": 8,
    },
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": {
        **CONVOLUTIONS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
    },
}


def tiny_config(family: str) -> PreTrainedConfig:
    """The configuration of a model of four small layers."""
    config: PreTrainedConfig = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    return config
