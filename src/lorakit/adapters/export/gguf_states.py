"""Families with states as GGUF: Mamba 2, gated delta nets and convolutions beside attention.

llama.cpp has `-exp(A_log)` where transformers has `A_log`, convolutions as matrices, and
multipliers inside of the weights that they multiply.
"""

from __future__ import annotations

from typing import Any

import gguf
import torch

from lorakit.adapters.export.gguf_experts import EXPERTS, experts, halves, sized_experts
from lorakit.adapters.export.gguf_layout import (
    GgufFamily,
    Parts,
    Settings,
    only,
    together,
)

_ARCH = gguf.MODEL_ARCH
_ATTENTION = ("attention", "full_attention")
_NO_CHOICE = ("",)  # the configuration has no setting for it


def _kv_heads(config: Any) -> list[int]:
    """The key heads of each layer: none in layers without attention."""
    heads = config.num_key_value_heads
    return [heads if kind in _ATTENTION else 0 for kind in config.layer_types]


def _mixer(name: str, tensor: torch.Tensor, heads: int = 1, groups: int = 1) -> Parts:
    """The parts of a mixer that are no linear layers.

    Args:
        heads: columns of A and D, 0 where they are vectors.
        groups: rows of a norm, 0 where it is a vector.
    """
    path, _, last = name.rpartition(".")
    if last == "A_log":
        tensor = -tensor.float().exp()
    if last in ("A_log", "D"):
        return [(name, tensor.reshape(-1, heads) if heads else tensor)]
    if last == "dt_bias":
        return [(f"{path}.dt_proj.bias", tensor)]
    if name.endswith(("conv1d.weight", "conv.conv.weight")):
        return [(name, tensor.squeeze(1))]
    if groups and name.endswith("mamba.norm.weight"):
        return [(name, tensor.reshape(groups, -1))]
    return [(name, tensor)]


# --- LFM2 -----------------------------------------------------------------------------------


def _lfm2(config: Any) -> Settings:
    return {
        "head_count_kv": _kv_heads(config),
        "shortconv_l_cache": config.conv_L_cache,
        "layer_norm_rms_eps": config.norm_eps,
        "feed_forward_length": _lfm2_width(config),
    }


def _lfm2_width(config: Any) -> int:
    """How wide the layers' MLPs are."""
    width: int = config.intermediate_size
    if not getattr(config, "block_auto_adjust_ff_dim", False):
        return width
    width = int(2 * width / 3)
    if config.block_ffn_dim_multiplier is not None:
        width = int(config.block_ffn_dim_multiplier * width)
    multiple: int = config.block_multiple_of
    return multiple * (-(-width // multiple))


def _lfm2_parts(name: str, tensor: torch.Tensor, _config: Any) -> Parts:
    if name.endswith("expert_bias"):
        return [(f"{name}.bias", tensor)]
    if ".feed_forward.experts." in name:  # in the tables without what stands before `layers`
        name = name.removeprefix("model.")
    return _mixer(name, tensor)


def _lfm2_moe(config: Any) -> Settings:
    return {
        **_lfm2(config),
        **sized_experts(config),
        "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
        "leading_dense_block_count": config.num_dense_layers,
    }


# --- Falcon-H1 ------------------------------------------------------------------------------


def _mamba2(config: Any) -> Settings:
    heads = config.mamba_n_heads
    return {
        "ssm_conv_kernel": config.mamba_d_conv,
        "ssm_inner_size": heads * config.mamba_d_head,
        "ssm_state_size": config.mamba_d_state,
        "ssm_time_step_rank": heads,
        "ssm_group_count": config.mamba_n_groups,
    }


def _unlimited(config: Any) -> str:
    limit = config.time_step_limit
    return "" if not limit or tuple(limit) == (0.0, float("inf")) else f"time_step_limit: {limit}"


def _falcon_unlike(config: Any) -> str:
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        return "mamba_norm_before_gate: true"
    return _unlimited(config)


def _falcon_parts(name: str, tensor: torch.Tensor, config: Any) -> Parts:
    """Multipliers of what layers give and take are in their weights."""
    layer = name.removesuffix(".weight").rpartition(".")[2]
    attention, inner = config.attention_in_multiplier, config.mamba_n_heads * config.mamba_d_head
    factor = {
        "q_proj": attention,
        "k_proj": attention * config.key_multiplier,
        "v_proj": attention,
        "o_proj": config.attention_out_multiplier,
        "gate_proj": config.mlp_multipliers[0],
        "down_proj": config.mlp_multipliers[1],
        "out_proj": config.ssm_out_multiplier,
        "lm_head": config.lm_head_multiplier,
        "embed_tokens": config.embedding_multiplier,
    }.get(layer)
    if layer == "in_proj":
        state = config.mamba_n_groups * config.mamba_d_state
        z, x, b, c, dt = config.ssm_multipliers
        sizes = ((z, inner), (x, inner), (b, state), (c, state), (dt, config.mamba_n_heads))
        each = tensor.new_tensor([value for value, size in sizes for _ in range(size)])
        return [(name, tensor * (config.ssm_in_multiplier * each)[:, None])]
    if layer == "embed_tokens" and config.tie_word_embeddings:
        head = ("lm_head.weight", tensor * config.lm_head_multiplier)
        return [(name, tensor * config.embedding_multiplier), head]
    if factor is not None:
        return [(name, tensor * factor)]
    return _mixer(name, tensor, groups=config.mamba_n_groups)


# --- Granite 4 ------------------------------------------------------------------------------


def granite(config: Any) -> Settings:
    """The four multipliers of Granite."""
    return {
        "attention_scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    }


def _granite_hybrid(config: Any) -> Settings:
    return {
        **_granite_experts(config),
        **_mamba2(config),
        "head_count_kv": _kv_heads(config),
        "rope_scaling_finetuned": config.position_embedding_type == "rope",
    }


def _granite_experts(config: Any) -> Settings:
    """Granite 4 without Mamba layers."""
    if not config.num_local_experts:
        return {**granite(config), "feed_forward_length": config.shared_intermediate_size}
    return {
        **granite(config),
        **experts(config),
        "expert_shared_feed_forward_length": config.shared_intermediate_size,
    }


def _granite_parts(name: str, tensor: torch.Tensor, config: Any) -> Parts:
    """Gate and up of experts and of the shared MLP apart; without experts it is the only MLP."""
    path, _, last = name.removesuffix(".weight").rpartition(".")
    shared = path.endswith("shared_mlp")
    if shared or path.endswith("block_sparse_moe"):
        layer = path.rpartition(".")[0]
        where = "mlp.experts" if not shared else "mlp.shared_experts"
        own = f"{layer}.{where if config.num_local_experts else 'mlp'}"
        if last == "input_linear":
            gate, up = halves(tensor, -2 if tensor.dim() == 3 else 0)
            return [(f"{own}.gate_proj.weight", gate), (f"{own}.up_proj.weight", up)]
        if last == "output_linear":
            return [(f"{own}.down_proj.weight", tensor)]
    return _mixer(name, tensor, groups=config.mamba_n_groups)


def _has_rope(config: Any) -> str:
    """Without Mamba layers llama.cpp always rotates."""
    return "" if config.position_embedding_type == "rope" else "attention without positions"


_GRANITE: dict[str, Any] = {"interleaves": True, "divided": _granite_parts}
_DENSE_GRANITE = GgufFamily(_ARCH.GRANITE, settings=_granite_experts, unlike=_has_rope, **_GRANITE)
_MOE_GRANITE = GgufFamily(
    _ARCH.GRANITE_MOE, settings=_granite_experts, unlike=_has_rope, **_GRANITE
)
_HYBRID_GRANITE = GgufFamily(
    _ARCH.GRANITE_HYBRID, settings=_granite_hybrid, unlike=_unlimited, **_GRANITE
)


def granite_4(config: Any) -> GgufFamily:
    """The family of a Granite 4 model, which may be without Mamba layers and without experts."""
    if not all(kind in _ATTENTION for kind in config.layer_types):
        return _HYBRID_GRANITE
    return _MOE_GRANITE if config.num_local_experts else _DENSE_GRANITE


# --- Qwen3-Next, Qwen 3.5 -------------------------------------------------------------------


def _delta(config: Any) -> Settings:
    heads = config.linear_num_value_heads
    return {
        "ssm_conv_kernel": config.linear_conv_kernel_dim,
        "ssm_state_size": config.linear_key_head_dim,
        "ssm_group_count": config.linear_num_key_heads,
        "ssm_time_step_rank": heads,
        "ssm_inner_size": heads * config.linear_value_head_dim,
        "full_attention_interval": _interval(config),
    }


def _interval(config: Any) -> int:
    """Each so many layers there is one of full attention."""
    kinds: list[str] = config.layer_types
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1


def _delta_unlike(config: Any) -> str:
    every = _interval(config)
    wanted = [(n + 1) % every == 0 for n in range(config.num_hidden_layers)]
    if [kind == "full_attention" for kind in config.layer_types] != wanted:
        return "layers of full attention at uneven distances"
    if config.linear_key_head_dim != config.linear_value_head_dim:
        return "linear_value_head_dim other than linear_key_head_dim"
    return ""


def _next(config: Any) -> Settings:
    return {**sized_experts(config), **_delta(config)}


def _next_parts(name: str, tensor: torch.Tensor, config: Any) -> Parts:
    """Queries, keys, values and gates lie head by head; in llama.cpp one kind after the other."""
    if not name.endswith("in_proj_qkvz.weight"):
        return _mixer(name, tensor, heads=0)
    keys, each = config.linear_num_key_heads, config.linear_num_value_heads
    k, v = config.linear_key_head_dim, config.linear_value_head_dim * each // keys
    q, key, value, z = (
        part.flatten(0, 1) for part in tensor.unflatten(0, (keys, -1)).split([k, k, v, v], 1)
    )
    path = name.removesuffix("in_proj_qkvz.weight")
    mixed = torch.cat((q, key, value))
    return [(f"{path}in_proj_qkv.weight", mixed), (f"{path}in_proj_z.weight", z)]


def _qwen35(config: Any) -> Settings:
    sections = config.rope_parameters.get("mrope_section") or [11, 11, 10]
    return {**_delta(config), "rope_dimension_sections": [*sections, 0][:4]}


def _qwen35_moe(config: Any) -> Settings:
    return {**sized_experts(config), **_qwen35(config)}


def _in_turns(tensor: torch.Tensor, config: Any, dim: int = 0) -> torch.Tensor:
    """Value heads of a key head stand together; in llama.cpp the first of each, then the second."""
    keys = config.linear_num_key_heads
    each = config.linear_num_value_heads // keys
    turned = tensor.unflatten(dim, (keys, each, -1)).transpose(dim, dim + 1)
    return turned.flatten(dim, dim + 2)


def _qwen35_parts(name: str, tensor: torch.Tensor, config: Any) -> Parts:
    [(name, tensor)] = _mixer(name, tensor, heads=0)
    if ".linear_attn." not in name:
        return [(name, tensor)]
    if ".in_proj_qkv." in name or ".conv1d." in name:
        before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        tensor = torch.cat((tensor[:before], _in_turns(tensor[before:], config)))
    elif name.endswith(("A_log", "dt_proj.bias")) or ".in_proj_" in name:
        tensor = _in_turns(tensor, config)
    return [(name, tensor)]


def _qwen35_columns(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    if not name.endswith("linear_attn.out_proj.weight"):
        return tensor
    return _in_turns(tensor, config, tensor.dim() - 1)


_DELTA_NORMS: dict[str, Any] = {
    "norm_offset": 1.0,
    "own_norms": ("linear_attn.norm.weight",),
    "unlike": _delta_unlike,
}

STATES = {
    "lfm2": GgufFamily(
        _ARCH.LFM2,
        activations=_NO_CHOICE,
        settings=_lfm2,
        unlike=only("conv_bias", False),
        divided=_lfm2_parts,
    ),
    "lfm2_moe": GgufFamily(
        _ARCH.LFM2MOE,
        activations=_NO_CHOICE,
        settings=_lfm2_moe,
        unlike=together(
            only("conv_bias", False),
            only("norm_topk_prob", True),
            only("routed_scaling_factor", 1.0),
            only("use_expert_bias", True),
        ),
        divided=_lfm2_parts,
    ),
    "falcon_h1": GgufFamily(
        _ARCH.FALCON_H1,
        settings=_mamba2,
        unlike=together(
            only("attention_bias", False),
            only("mlp_bias", False),
            only("projectors_bias", False),
            only("mamba_proj_bias", False),
            only("mamba_conv_bias", True),
            _falcon_unlike,
        ),
        divided=_falcon_parts,
    ),
    "granitemoehybrid": _HYBRID_GRANITE,
    "qwen3_next": GgufFamily(
        _ARCH.QWEN3NEXT,
        settings=_next,
        divided=_next_parts,
        **{**_DELTA_NORMS, "unlike": together(_delta_unlike, EXPERTS["qwen3_moe"].unlike)},
    ),
    "qwen3_5_text": GgufFamily(
        _ARCH.QWEN35,
        settings=_qwen35,
        divided=_qwen35_parts,
        columns=_qwen35_columns,
        **_DELTA_NORMS,
    ),
    "qwen3_5_moe_text": GgufFamily(
        _ARCH.QWEN35MOE,
        settings=_qwen35_moe,
        divided=_qwen35_parts,
        columns=_qwen35_columns,
        **_DELTA_NORMS,
    ),
}
"""By `config.model_type`."""
