"""What of a model is called and laid out otherwise in GGUF, and its settings there.

Names come from the `gguf` package's own tables. What a table does not say is here: rotary halves
that llama.cpp wants interleaved, GPT-2's transposed weights, hyperparameters, and what llama.cpp
computes otherwise than transformers, which is refused or named.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

import gguf
import torch

from lorakit.adapters.export.gguf_families import FAMILIES, family_for
from lorakit.adapters.export.gguf_layout import GgufFamily, Settings
from lorakit.errors import InputError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # GPT-2's Conv1D


_WITH_PICTURES = ("gemma3", "llama4", "mistral3", "qwen3_5", "qwen3_5_moe")
"""Model types whose language part llama.cpp has as if it were alone."""
_LANGUAGE = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_PICTURES = re.compile(r"(model\.)?(visual|vision_tower|vision_model|multi_modal_projector)\.")


def language_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the language part, of a model with pictures; else `config` itself."""
    return config.get_text_config() if config.model_type in _WITH_PICTURES else config


def language_name(name: str) -> str:
    """What a tensor of a model with pictures is called in its language part alone; "" for none."""
    if _PICTURES.match(name):
        return ""
    for before, after in _LANGUAGE.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def family_of(config: PreTrainedConfig, model: str) -> GgufFamily:
    """The family of a model with this configuration.

    Raises:
        InputError: it is of none, or computes something that llama.cpp does not.
    """
    family = family_for(config)
    if family is None:
        raise InputError(
            f"{model} is a {config.model_type} model, which lorakit cannot write as GGUF: it knows "
            f"{listed(FAMILIES, 60)}. llama.cpp's own convert_hf_to_gguf.py may: merge first"
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
        _other_yarn(family, _rope(config)),
    ]
    if found := [what for what in unlike if what]:
        raise InputError(f"{model} uses {found[0]}, which llama.cpp does not for {family.name}")
    return family


def tensor_name(family: GgufFamily, config: PreTrainedConfig, name: str) -> str:
    """llama.cpp's name for the tensor `name` (`model.layers.0.self_attn.q_proj.weight`)."""
    table = _names(family.arch, config.num_hidden_layers)
    found = table.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise InputError(
            f"{name} has no place in llama.cpp's {family.name} with {config.num_hidden_layers} "
            "layers: is the adapter for another base model?"
        )
    return str(found)


@cache
def _names(arch: gguf.MODEL_ARCH, layers: int) -> gguf.TensorNameMap:
    return gguf.get_tensor_name_map(arch, layers)


def laid_out(
    family: GgufFamily, config: PreTrainedConfig, name: str, tensor: torch.Tensor
) -> torch.Tensor:
    """The model's tensor as llama.cpp has it: (d_out, d_in), rotary rows interleaved."""
    if family.arch == gguf.MODEL_ARCH.GPT2 and name.endswith(_TRANSPOSED):
        return tensor.T
    added = name.endswith("norm.weight") and not name.endswith(family.own_norms or "/")
    if family.norm_offset and added:
        return tensor.float() + family.norm_offset
    tensor = family.ordered(name, tensor, config)
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
    found = _usual(config)
    if family.arch == gguf.MODEL_ARCH.GPT2:
        found["layer_norm_eps"] = config.layer_norm_epsilon
    else:
        found |= _of_attention(config) | family.settings(config)
    for name, value in found.items():
        getattr(writer, f"add_{name}")(value)


def _usual(config: PreTrainedConfig) -> Settings:
    hidden: int = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": hidden,
        "feed_forward_length": inner or 4 * hidden,
        "head_count": config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }


def _of_attention(config: PreTrainedConfig) -> Settings:
    heads: int = config.num_attention_heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = _rope(config)
    found: Settings = {
        "head_count_kv": config.num_key_value_heads,
        "key_length": head_dim,
        "value_length": head_dim,
        "rope_dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
    }
    if hasattr(config, "rms_norm_eps"):
        found["layer_norm_rms_eps"] = config.rms_norm_eps
    if "rope_theta" in rope:
        found["rope_freq_base"] = rope["rope_theta"]
    if _rope_type(config) == "linear":
        found["rope_scaling_type"] = gguf.RopeScalingType.LINEAR
        found["rope_scaling_factor"] = rope["factor"]
    if _rope_type(config) == "yarn":
        before = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        found |= {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": rope["factor"],
            "rope_scaling_orig_ctx_len": before,
            "rope_scaling_yarn_beta_fast": rope.get("beta_fast") or 32.0,
            "rope_scaling_yarn_beta_slow": rope.get("beta_slow") or 1.0,
        }
    return found


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


def _other_yarn(family: GgufFamily, rope: dict[str, Any]) -> str:
    """What llama.cpp's YaRN does not have: factors of attention other than 0.1 ln(factor) + 1."""
    if rope.get("rope_type") != "yarn":
        return ""
    for name in ("attention_factor", "mscale", "mscale_all_dim", "llama_4_scaling_beta"):
        if rope.get(name) and name not in family.yarn:
            return f"the rotary scaling yarn with {name}"
    return ""


def _rope_type(config: PreTrainedConfig) -> str:
    return str(_rope(config).get("rope_type", "default"))


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary settings: of layers with full attention, where others have their own."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)
