"""What of a model is called and laid out otherwise in GGUF, and its settings there.

Names come from the `gguf` package's own tables. What a table does not say is here: rotary halves
that llama.cpp wants interleaved, GPT-2's transposed weights, hyperparameters, and what llama.cpp
computes otherwise than transformers, which is refused or named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import torch

from lorakit.adapters.export.gguf_families import FAMILIES, GgufFamily
from lorakit.errors import InputError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # GPT-2's Conv1D


def family_of(config: PreTrainedConfig, model: str) -> GgufFamily:
    """The family of a model with this configuration.

    Raises:
        InputError: it is of none, or computes something that llama.cpp does not.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(
            f"{model} is a {config.model_type} model, which lorakit cannot write as GGUF: it knows "
            f"{listed(FAMILIES, 40)}. llama.cpp's own convert_hf_to_gguf.py may: merge first"
        )
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((own for name in names if (own := getattr(config, name, None))), "")
    unlike = [
        f"the activation {activation}" if activation not in family.activations else "",
        "scale_attn_by_inverse_layer_idx"
        if getattr(config, "scale_attn_by_inverse_layer_idx", False)
        else "",
        f"the rotary scaling {_rope_type(config)}"
        if _rope_type(config) not in family.ropes
        else "",
        family.unlike(config),
        _other_yarn(_rope(config)),
    ]
    if found := [what for what in unlike if what]:
        raise InputError(f"{model} uses {found[0]}, which llama.cpp does not for {family.name}")
    return family


def tensor_name(family: GgufFamily, config: PreTrainedConfig, name: str) -> str:
    """llama.cpp's name for the tensor `name` (`model.layers.0.self_attn.q_proj.weight`)."""
    table = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise InputError(
            f"{name} has no place in llama.cpp's {family.name} with {config.num_hidden_layers} "
            "layers: is the adapter for another base model?"
        )
    return str(found)


def laid_out(
    family: GgufFamily, config: PreTrainedConfig, name: str, tensor: torch.Tensor
) -> torch.Tensor:
    """The model's tensor as llama.cpp has it: (d_out, d_in), rotary rows interleaved."""
    if family.arch == gguf.MODEL_ARCH.GPT2 and name.endswith(_TRANSPOSED):
        return tensor.T
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor.float() + family.norm_offset
    return interleaved(family, config, name.rpartition(".")[0], tensor)


def interleaved(
    family: GgufFamily, config: PreTrainedConfig, path: str, rows: torch.Tensor
) -> torch.Tensor:
    """`rows` (d_out, …) of the module at `path` in llama.cpp's order.

    Of each head's rows the two halves go in turns: transformers rotates row i with row i + d/2,
    llama.cpp row 2 i with row 2 i + 1.
    """
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }.get(path.rpartition(".")[2])
    if heads is None or not family.interleaves:
        return rows
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def add_hyperparameters(
    writer: gguf.GGUFWriter, family: GgufFamily, config: PreTrainedConfig
) -> None:
    """Writes the sizes and settings that llama.cpp builds the model from."""
    hidden: int = config.hidden_size
    head_dim: int = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner or 4 * hidden)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if family.arch == gguf.MODEL_ARCH.GPT2:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    family.settings(writer, config)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = _rope(config)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if _rope_type(config) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if _rope_type(config) == "yarn":
        before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(before)
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32.0)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1.0)


def extra_tensors(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Tensors of llama.cpp's that are settings in transformers: Llama 3's rotary factors."""
    if _rope_type(config) != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = 2 * len(scaled)
    theta: float = _rope(config)["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return {"rope_freqs.weight": plain / scaled}


def differences(family: GgufFamily, config: PreTrainedConfig, model: str) -> list[str]:
    """What llama.cpp computes otherwise than transformers, in lines for the user."""
    found = []
    if _rope_type(config) == "yarn" and not _rope(config).get("truncate", True):
        found.append(
            f"{model} scales rotary positions between dimensions that are not whole (truncate: "
            "false), llama.cpp between whole ones: logits differ a little"
        )
    window = getattr(config, "sliding_window", None)
    if not window or family.windows or window >= config.max_position_embeddings:
        return found
    return [
        *found,
        f"{model} attends to the last {window} tokens, llama.cpp to all: the same up to that "
        "length",
    ]


def _other_yarn(rope: dict[str, Any]) -> str:
    """What llama.cpp's YaRN does not have: factors of attention other than 0.1 ln(factor) + 1."""
    if rope.get("rope_type") != "yarn":
        return ""
    for name in ("attention_factor", "mscale", "mscale_all_dim", "llama_4_scaling_beta"):
        if rope.get(name):
            return f"the rotary scaling yarn with {name}"
    return ""


def _rope_type(config: PreTrainedConfig) -> str:
    return str(_rope(config).get("rope_type", "default"))


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary settings: of layers with full attention, where others have their own."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)
