"""The families of models that can be written as GGUF, and what dense ones need beside the usual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf

from lorakit.adapters.export.gguf_experts import EXPERTS
from lorakit.adapters.export.gguf_layout import GgufFamily, Settings, together
from lorakit.adapters.export.gguf_states import STATES, granite, granite_4

_ARCH = gguf.MODEL_ARCH


def _windowed(every: int) -> Callable[[Any], str]:
    """Full attention in each layer whose number is a multiple of `every`, windows in others."""

    def unlike(config: Any) -> str:
        full = [kind == "full_attention" for kind in config.layer_types]
        wanted = [(layer + 1) % every == 0 for layer in range(len(full))]
        return "" if full == wanted else f"layer_types other than one full layer in {every}"

    return unlike


def _gemma2(config: Any) -> Settings:
    found = {"sliding_window": config.sliding_window}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if value := getattr(config, name):
            found[name] = value
    return found


def _gemma3(config: Any) -> Settings:
    theta = config.rope_parameters["sliding_attention"]["rope_theta"]
    return {"sliding_window": config.sliding_window, "rope_freq_base_swa": theta}


def _same_scale(config: Any) -> str:
    other = config.query_pre_attn_scalar != config.head_dim
    return "query_pre_attn_scalar other than head_dim" if other else ""


def _gemma3_unlike(config: Any) -> str:
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        return "logit softcapping"
    if config.rope_parameters["sliding_attention"]["rope_type"] != "default":
        return "a rotary scaling of layers with windows"
    return ""


def _phi3(config: Any) -> Settings:
    return {"sliding_window": config.sliding_window or 0}


def _olmo3(config: Any) -> Settings:
    pattern = [kind == "sliding_attention" for kind in config.layer_types]
    return {"sliding_window": config.sliding_window, "sliding_window_pattern": pattern}


def _olmo3_unlike(config: Any) -> str:
    ropes = list(config.rope_parameters.values())
    return "" if ropes[0] == ropes[1] else "other rotary positions in layers with windows"


def _smollm3_unlike(config: Any) -> str:
    wanted = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    return "" if list(config.no_rope_layers) == wanted else "no_rope_layers other than each fourth"


def _ministral3(config: Any) -> Settings:
    rope = config.rope_parameters
    return {
        "rope_scaling_yarn_log_mul": rope["mscale_all_dim"],
        "attn_temperature_scale": rope["llama_4_scaling_beta"],
    }


_LLAMA_ROPES = ("default", "linear", "yarn", "llama3")

FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(  # SmolLM2 too
        _ARCH.LLAMA, interleaves=True, ropes=_LLAMA_ROPES
    ),
    "mistral": GgufFamily(_ARCH.LLAMA, interleaves=True, ropes=_LLAMA_ROPES),
    "qwen2": GgufFamily(_ARCH.QWEN2),
    "qwen3": GgufFamily(_ARCH.QWEN3),
    "gpt2": GgufFamily(_ARCH.GPT2, ("gelu_new", "gelu_pytorch_tanh")),
    "glm": GgufFamily(_ARCH.CHATGLM),
    "glm4": GgufFamily(_ARCH.GLM4),
    "gemma2": GgufFamily(
        _ARCH.GEMMA2,
        ("gelu_pytorch_tanh",),
        norm_offset=1.0,
        windows=True,
        settings=_gemma2,
        unlike=together(_same_scale, _windowed(2)),
    ),
    "gemma3_text": GgufFamily(
        _ARCH.GEMMA3,
        ("gelu_pytorch_tanh",),
        norm_offset=1.0,
        windows=True,
        settings=_gemma3,
        unlike=together(_gemma3_unlike, _same_scale, _windowed(6)),
    ),
    "phi3": GgufFamily(_ARCH.PHI3, windows=True, settings=_phi3),
    "smollm3": GgufFamily(_ARCH.SMOLLM3, interleaves=True, unlike=_smollm3_unlike),
    "olmo2": GgufFamily(_ARCH.OLMO2),
    "olmo3": GgufFamily(_ARCH.OLMO2, windows=True, settings=_olmo3, unlike=_olmo3_unlike),
    "granite": GgufFamily(_ARCH.GRANITE, interleaves=True, settings=granite),
    "ernie4_5": GgufFamily(_ARCH.ERNIE4_5),
    "ministral3": GgufFamily(
        _ARCH.MISTRAL3,
        interleaves=True,
        ropes=("yarn",),
        yarn=("mscale", "mscale_all_dim", "llama_4_scaling_beta"),
        settings=_ministral3,
    ),
    **EXPERTS,
    **STATES,
    "seed_oss": GgufFamily(_ARCH.SEED_OSS),
    "hunyuan_v1_dense": GgufFamily(_ARCH.HUNYUAN_DENSE),
}
"""By `config.model_type`."""


def family_for(config: Any) -> GgufFamily | None:
    """The family of a model with this configuration; None where it is of none."""
    if config.model_type == "granitemoehybrid":
        return granite_4(config)
    return FAMILIES.get(config.model_type)
