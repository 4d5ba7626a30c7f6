"""The families of models that can be written as GGUF, and what each needs beside the usual.

A family is one entry of `FAMILIES`. Names of tensors come from the `gguf` package's tables; what
llama.cpp fixes in its code for a family (`src/llama-model.cpp`) and a configuration may have
otherwise is refused by `unlike`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf

if TYPE_CHECKING:
    import torch

_ARCH = gguf.MODEL_ARCH
Hook = Callable[[gguf.GGUFWriter, Any], None]
Parts = list[tuple[str, "torch.Tensor"]]


def _nothing(writer: gguf.GGUFWriter, config: Any) -> None:
    """A family without settings of its own."""


def _as_llama_cpp(config: Any) -> str:
    """Nothing in the configuration is unlike what llama.cpp does."""
    return ""


@dataclass(frozen=True)
class GgufFamily:
    """How one of transformers' model types stands in llama.cpp.

    Attributes:
        activations: those that llama.cpp computes for it.
        interleaves: llama.cpp rotates neighbouring pairs where transformers rotates halves, so that
            the rows of the query and key projections change places.
        ropes: the kinds of rotary scaling that it computes.
        norm_offset: what transformers adds to the weights of norms; llama.cpp's hold it.
        windows: it keeps to the sliding windows of the configuration.
        settings: writes the family's own hyperparameters.
        unlike: what a configuration has that llama.cpp does not compute, in words, or "".
        divided: the tensors of llama.cpp that one of the model's becomes; None for the usual.
    """

    arch: gguf.MODEL_ARCH
    activations: tuple[str, ...] = ("silu",)
    interleaves: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    norm_offset: float = 0.0
    windows: bool = False
    settings: Hook = _nothing
    unlike: Callable[[Any], str] = _as_llama_cpp
    divided: Callable[[str, torch.Tensor], Parts] | None = None

    @property
    def name(self) -> str:
        """llama.cpp's word for it."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])


def _experts(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)


def _sized_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    _experts(writer, config)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if shared := getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(shared)


def _plain_layers(config: Any) -> str:
    """Layers without experts among those with them, which llama.cpp does not know here."""
    mixed = config.decoder_sparse_step != 1 or config.mlp_only_layers
    return "layers without experts (mlp_only_layers, decoder_sparse_step)" if mixed else ""


def _normalised(wanted: bool) -> Callable[[Any], str]:
    def unlike(config: Any) -> str:
        other = bool(config.norm_topk_prob) != wanted
        return f"norm_topk_prob: {str(not wanted).lower()}" if other else _plain_layers(config)

    return unlike


def _windowed(every: int) -> Callable[[Any], str]:
    """Full attention in each layer whose number is a multiple of `every`, windows in others."""

    def unlike(config: Any) -> str:
        full = [kind == "full_attention" for kind in config.layer_types]
        wanted = [(layer + 1) % every == 0 for layer in range(len(full))]
        return "" if full == wanted else f"layer_types other than one full layer in {every}"

    return unlike


def _gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _gemma2_unlike(config: Any) -> str:
    if config.query_pre_attn_scalar != config.head_dim:
        return "query_pre_attn_scalar other than head_dim"
    return _windowed(2)(config)


def _gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])


def _gemma3_unlike(config: Any) -> str:
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        return "logit softcapping"
    if config.query_pre_attn_scalar != config.head_dim:
        return "query_pre_attn_scalar other than head_dim"
    if config.rope_parameters["sliding_attention"]["rope_type"] != "default":
        return "a rotary scaling of layers with windows"
    return _windowed(6)(config)


def _phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window or 0)


def _olmo3(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def _olmo3_unlike(config: Any) -> str:
    ropes = list(config.rope_parameters.values())
    return "" if ropes[0] == ropes[1] else "other rotary positions in layers with windows"


def _granite(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _smollm3_unlike(config: Any) -> str:
    wanted = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    return "" if list(config.no_rope_layers) == wanted else "no_rope_layers other than each fourth"


def _gpt_oss(writer: gguf.GGUFWriter, config: Any) -> None:
    _experts(writer, config)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_sliding_window(config.sliding_window)


def _gpt_oss_parts(name: str, tensor: torch.Tensor) -> Parts:
    """llama.cpp has apart what lies in turns in `gate_up_proj`, and experts as (d_out, d_in)."""
    path, _, last = name.rpartition(".")
    if last == "down_proj":
        return [(f"{path}.down_proj.weight", tensor.transpose(1, 2))]
    if last == "down_proj_bias":
        return [(f"{path}.down_proj.bias", tensor)]
    if last in ("gate_up_proj", "gate_up_proj_bias"):
        kind = "bias" if last.endswith("bias") else "weight"
        halves = (tensor[..., ::2], tensor[..., 1::2])
        gate, up = (half if kind == "bias" else half.transpose(1, 2) for half in halves)
        return [(f"{path}.gate_proj.{kind}", gate), (f"{path}.up_proj.{kind}", up)]
    return [(f"{name}.weight" if last == "sinks" else name, tensor)]


_LLAMA_ROPES = ("default", "linear", "yarn", "llama3")

FAMILIES = {
    "llama": GgufFamily(  # SmolLM2 too
        _ARCH.LLAMA, interleaves=True, ropes=_LLAMA_ROPES
    ),
    "mistral": GgufFamily(_ARCH.LLAMA, interleaves=True, ropes=_LLAMA_ROPES),
    "mixtral": GgufFamily(_ARCH.LLAMA, interleaves=True, settings=_experts),
    "qwen2": GgufFamily(_ARCH.QWEN2),
    "qwen2_moe": GgufFamily(_ARCH.QWEN2MOE, settings=_sized_experts, unlike=_normalised(False)),
    "qwen3": GgufFamily(_ARCH.QWEN3),
    "qwen3_moe": GgufFamily(_ARCH.QWEN3MOE, settings=_sized_experts, unlike=_normalised(True)),
    "gpt2": GgufFamily(_ARCH.GPT2, ("gelu_new", "gelu_pytorch_tanh")),
    "glm": GgufFamily(_ARCH.CHATGLM),
    "glm4": GgufFamily(_ARCH.GLM4),
    "gemma2": GgufFamily(
        _ARCH.GEMMA2,
        ("gelu_pytorch_tanh",),
        norm_offset=1.0,
        windows=True,
        settings=_gemma2,
        unlike=_gemma2_unlike,
    ),
    "gemma3_text": GgufFamily(
        _ARCH.GEMMA3,
        ("gelu_pytorch_tanh",),
        norm_offset=1.0,
        windows=True,
        settings=_gemma3,
        unlike=_gemma3_unlike,
    ),
    "phi3": GgufFamily(_ARCH.PHI3, windows=True, settings=_phi3),
    "smollm3": GgufFamily(_ARCH.SMOLLM3, interleaves=True, unlike=_smollm3_unlike),
    "olmo2": GgufFamily(_ARCH.OLMO2),
    "olmo3": GgufFamily(_ARCH.OLMO2, windows=True, settings=_olmo3, unlike=_olmo3_unlike),
    "granite": GgufFamily(_ARCH.GRANITE, interleaves=True, settings=_granite),
    "ernie4_5": GgufFamily(_ARCH.ERNIE4_5),
    "seed_oss": GgufFamily(_ARCH.SEED_OSS),
    "hunyuan_v1_dense": GgufFamily(_ARCH.HUNYUAN_DENSE),
    "gpt_oss": GgufFamily(
        _ARCH.GPT_OSS,
        windows=True,
        settings=_gpt_oss,
        unlike=_windowed(2),
        divided=_gpt_oss_parts,
    ),
}
"""By `config.model_type`."""
