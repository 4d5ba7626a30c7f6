"""Families with experts as GGUF: their settings, and how stacked experts lie.

Where weights of experts are in one tensor with what they are multiplied beside, llama.cpp has them
apart; experts one by one are stacked before they come here (`gguf_files.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import gguf

from lorakit.adapters.export.gguf_layout import GgufFamily, Parts, Settings, only, together

if TYPE_CHECKING:
    import torch

_ARCH = gguf.MODEL_ARCH
_SIGMOID = gguf.ExpertGatingFuncType.SIGMOID
_SOFTMAX = gguf.ExpertGatingFuncType.SOFTMAX


def experts(config: Any) -> Settings:
    """How many experts there are, and how many a token has."""
    return {
        "expert_count": getattr(config, "num_local_experts", None) or config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
    }


def sized_experts(config: Any) -> Settings:
    """Experts of a width of their own, and a shared one."""
    found = {**experts(config), "expert_feed_forward_length": config.moe_intermediate_size}
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        found["expert_shared_feed_forward_length"] = shared
    return found


def halves(gate_and_up: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of a tensor that has both, one behind the other."""
    gate, up = gate_and_up.chunk(2, dim)
    return gate, up


def _plain_layers(config: Any) -> str:
    """Layers without experts among those with them, which llama.cpp does not know here."""
    mixed = config.decoder_sparse_step != 1 or config.mlp_only_layers
    return "layers without experts (mlp_only_layers, decoder_sparse_step)" if mixed else ""


def normalised(wanted: bool) -> Callable[[Any], str]:
    """Experts in all layers, whose weights sum to 1 (or do not)."""
    return together(only("norm_topk_prob", wanted), _plain_layers)


def correction(name: str, tensor: torch.Tensor, _config: Any) -> Parts:
    """The bias by which experts are chosen has a name as a weight's bias has."""
    if name.endswith("e_score_correction_bias"):
        return [(name.replace("_bias", ".bias"), tensor.flatten())]
    return [(name, tensor)]


# --- gpt-oss, Llama 4 -----------------------------------------------------------------------


def _gpt_oss(config: Any) -> Settings:
    return {
        **experts(config),
        "expert_feed_forward_length": config.intermediate_size,
        "sliding_window": config.sliding_window,
    }


def _gpt_oss_unlike(config: Any) -> str:
    full = [kind == "full_attention" for kind in config.layer_types]
    wanted = [(layer + 1) % 2 == 0 for layer in range(len(full))]
    return "" if full == wanted else "layer_types other than one full layer in 2"


def _gpt_oss_parts(name: str, tensor: torch.Tensor, _config: Any) -> Parts:
    """llama.cpp has apart what lies in turns in `gate_up_proj`, and experts as (d_out, d_in)."""
    path, _, last = name.rpartition(".")
    if last == "down_proj":
        return [(f"{path}.down_proj.weight", tensor.transpose(1, 2))]
    if last == "down_proj_bias":
        return [(f"{path}.down_proj.bias", tensor)]
    if last in ("gate_up_proj", "gate_up_proj_bias"):
        kind = "bias" if last.endswith("bias") else "weight"
        turns = (tensor[..., ::2], tensor[..., 1::2])
        gate, up = (half if kind == "bias" else half.transpose(1, 2) for half in turns)
        return [(f"{path}.gate_proj.{kind}", gate), (f"{path}.up_proj.{kind}", up)]
    return [(f"{name}.weight" if last == "sinks" else name, tensor)]


def _llama4(config: Any) -> Settings:
    return {
        **experts(config),
        "feed_forward_length": config.intermediate_size_mlp,
        "expert_feed_forward_length": config.intermediate_size,
        "interleave_moe_layer_step": config.interleave_moe_layer_step,
    }


def _llama4_unlike(config: Any) -> str:
    layers = range(1, config.num_hidden_layers + 1)
    if list(config.no_rope_layers) != [int(layer % 4 != 0) for layer in layers]:
        return "no_rope_layers other than each fourth"
    if [kind == "full_attention" for kind in config.layer_types] != [n % 4 == 0 for n in layers]:
        return "layer_types other than one full layer in 4"
    step = config.interleave_moe_layer_step
    if list(config.moe_layers) != [n - 1 for n in layers if n % step == 0]:
        return "moe_layers other than each of interleave_moe_layer_step"
    if config.use_qk_norm != (config.num_local_experts != 128):
        return f"use_qk_norm: {config.use_qk_norm}"
    return ""


def _llama4_parts(name: str, tensor: torch.Tensor, _config: Any) -> Parts:
    """Stacked experts (experts, d_in, d_out) as (experts, d_out, d_in), gate and up apart."""
    path, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        gate, up = halves(tensor.transpose(1, 2), 1)
        return [(f"{path}.gate_proj.weight", gate), (f"{path}.up_proj.weight", up)]
    if last == "down_proj":
        return [(f"{name}.weight", tensor.transpose(1, 2))]
    return [(name, tensor)]


# --- DeepSeek V2 and V3, Kimi K2, GLM-4.7-Flash ---------------------------------------------


def _dense_first(config: Any) -> int:
    """How many layers at the beginning have no experts."""
    kinds = getattr(config, "mlp_layer_types", None)
    return kinds.count("dense") if kinds else int(config.first_k_dense_replace)


def _routed(config: Any, gating: gguf.ExpertGatingFuncType) -> Settings:
    """Routed experts beside shared ones, in all layers but the first."""
    return {
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": gating,
        "leading_dense_block_count": _dense_first(config),
    }


def _latent(config: Any) -> Settings:
    """Latent attention: keys and values of all heads are one that is compressed."""
    rope, compressed = config.qk_rope_head_dim, config.kv_lora_rank
    found = {
        "head_count_kv": 1,
        "key_length": compressed + rope,
        "value_length": compressed,
        "key_length_mla": config.qk_nope_head_dim + rope,
        "value_length_mla": config.v_head_dim,
        "kv_lora_rank": compressed,
        "rope_dimension_count": rope,
    }
    if config.q_lora_rank:
        found["q_lora_rank"] = config.q_lora_rank
    scaled = config.rope_parameters.get("mscale_all_dim")
    if config.rope_parameters.get("rope_type") == "yarn" and scaled:
        found["rope_scaling_yarn_log_mul"] = 0.1 * scaled
    return found


def _deepseek2(config: Any) -> Settings:
    # Without expert_weights_norm, V2 scales what its softmax gives.
    return {**_latent(config), **_routed(config, _SOFTMAX), "expert_weights_norm": False}


def _deepseek3(config: Any) -> Settings:
    groups = {
        "expert_group_count": config.n_group or 1,
        "expert_group_used_count": config.topk_group or 1,
    }
    return {**_latent(config), **_routed(config, _SIGMOID), **groups}


def _latent_unlike(config: Any) -> str:
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds and "dense" in kinds[_dense_first(config) :]:
        return "layers without experts behind those with them"
    if not config.q_lora_rank and config.num_hidden_layers not in (26, 27):
        return f"q_lora_rank: null with {config.num_hidden_layers} layers"
    rope = config.rope_parameters
    if rope.get("mscale") != rope.get("mscale_all_dim"):
        return "mscale other than mscale_all_dim"
    return "" if rope.get("rope_interleave", True) else "rope_interleave: false"


def _latent_parts(name: str, tensor: torch.Tensor, config: Any) -> Parts:
    """What restores keys and values from the compressed ones lies apart, a matrix a head."""
    if not name.endswith("kv_b_proj.weight"):
        return correction(name, tensor, config)
    nope, heads = config.qk_nope_head_dim, config.num_attention_heads
    keys, values = tensor.unflatten(0, (heads, -1)).split([nope, config.v_head_dim], 1)
    path = name.removesuffix("kv_b_proj.weight")
    return [(f"{path}k_b_proj.weight", keys.mT), (f"{path}v_b_proj.weight", values)]


_LATENT: dict[str, Any] = {
    "yarn": ("mscale", "mscale_all_dim"),
    "divided": _latent_parts,
    # Each a product of its own in llama.cpp, `kv_b_proj` two stacks of them.
    "not_adapted": ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "lm_head"),
}

# --- others ---------------------------------------------------------------------------------


def _glm4_moe(config: Any) -> Settings:
    return _routed(config, _SIGMOID)


def _minimax_m2(config: Any) -> Settings:
    return {
        **experts(config),
        "expert_feed_forward_length": config.intermediate_size,
        "expert_gating_func": _SIGMOID,
    }


def _ernie(config: Any) -> Settings:
    shared = config.moe_num_shared_experts
    found = {
        "expert_count": config.moe_num_experts,
        "expert_used_count": config.moe_k,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "interleave_moe_layer_step": config.moe_layer_interval,
        "leading_dense_block_count": config.moe_layer_start_index,
        "expert_shared_count": shared,
    }
    if shared:
        found["expert_shared_feed_forward_length"] = shared * config.moe_intermediate_size
    return found


def _ernie_unlike(config: Any) -> str:
    last = config.moe_layer_end_index
    return "" if last in (-1, config.num_hidden_layers - 1) else f"moe_layer_end_index: {last}"


def _hunyuan(config: Any) -> Settings:
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.moe_topk,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_shared_feed_forward_length": config.intermediate_size,
        "expert_shared_count": 1,
    }


def _hunyuan_unlike(config: Any) -> str:
    for name in ("num_experts", "moe_topk"):
        if not isinstance(getattr(config, name), int):
            return f"{name} of each layer"
    return ""


EXPERTS = {
    "mixtral": GgufFamily(_ARCH.LLAMA, interleaves=True, settings=experts),
    "qwen2_moe": GgufFamily(_ARCH.QWEN2MOE, settings=sized_experts, unlike=normalised(False)),
    "qwen3_moe": GgufFamily(_ARCH.QWEN3MOE, settings=sized_experts, unlike=normalised(True)),
    "gpt_oss": GgufFamily(
        _ARCH.GPT_OSS,
        windows=True,
        settings=_gpt_oss,
        unlike=_gpt_oss_unlike,
        divided=_gpt_oss_parts,
    ),
    "llama4_text": GgufFamily(
        _ARCH.LLAMA4,
        ropes=("default", "llama3"),
        windows=True,
        settings=_llama4,
        unlike=together(
            only("attention_chunk_size", 8192),
            only("floor_scale", 8192),
            only("attn_scale", 0.1),
            only("attn_temperature_tuning", True, 4),
            _llama4_unlike,
        ),
        divided=_llama4_parts,
    ),
    "deepseek_v2": GgufFamily(
        _ARCH.DEEPSEEK2,
        settings=_deepseek2,
        unlike=together(only("topk_method", "greedy"), _latent_unlike),
        **_LATENT,
    ),
    "deepseek_v3": GgufFamily(
        _ARCH.DEEPSEEK2, settings=_deepseek3, unlike=_latent_unlike, **_LATENT
    ),
    "glm4_moe_lite": GgufFamily(
        _ARCH.DEEPSEEK2, settings=_deepseek3, unlike=_latent_unlike, **_LATENT
    ),
    "glm4_moe": GgufFamily(
        _ARCH.GLM4_MOE,
        settings=_glm4_moe,
        unlike=only("n_group", 1),
        divided=correction,
    ),
    "minimax_m2": GgufFamily(_ARCH.MINIMAXM2, settings=_minimax_m2, divided=correction),
    "ernie4_5_moe": GgufFamily(
        _ARCH.ERNIE4_5_MOE, settings=_ernie, unlike=_ernie_unlike, divided=correction
    ),
    "hunyuan_v1_moe": GgufFamily(_ARCH.HUNYUAN_MOE, settings=_hunyuan, unlike=_hunyuan_unlike),
}
"""By `config.model_type`."""
