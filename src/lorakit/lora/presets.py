"""The presets of `target_modules`: `attention-minimal`, `attention` and `all-linear`.

They are found by what modules are called and where they stand, so that fused and renamed
projections (`c_attn`, `query_key_value`, `qkv_proj`) are found too.
"""

from collections.abc import Iterable

from torch import nn

PRESETS = ("attention-minimal", "attention", "all-linear")

# What the projections of attention are called, by the families of transformers.
_FUSED = frozenset({"c_attn", "query_key_value", "qkv_proj", "Wqkv", "qkv", "in_proj"})
_QUERY = frozenset({"q_proj", "query", "q_lin", "query_proj", "q", "q_attn", "to_q", "wq"})
_KEY = frozenset({"k_proj", "key", "k_lin", "key_proj", "k", "to_k", "wk"})
_VALUE = frozenset({"v_proj", "value", "v_lin", "value_proj", "v", "to_v", "wv"})
_OUTPUT = frozenset({"o_proj", "out_proj", "out_lin", "dense", "c_proj", "o", "to_out", "Wo", "wo"})
# DeepSeek's latent attention projects in two steps.
_LATENT_QUERY = frozenset({"q_a_proj", "q_b_proj"})
_LATENT_KEY_VALUE = frozenset({"kv_a_proj_with_mqa", "kv_b_proj"})

_MINIMAL = _QUERY | _VALUE | _FUSED | _LATENT_QUERY | _LATENT_KEY_VALUE
_ATTENTION = _MINIMAL | _KEY | _OUTPUT


def preset_names(preset: str, linear: Iterable[str]) -> list[str]:
    """Those of the paths of a model's linear modules, without its head, that `preset` means."""
    if preset == "all-linear":
        return list(linear)
    wanted = _MINIMAL if preset == "attention-minimal" else _ATTENTION
    return [name for name in linear if name.rpartition(".")[2] in wanted and _in_attention(name)]


def _in_attention(name: str) -> bool:
    """Whether a module stands in an attention block: `dense` or `c_proj` do outside it too."""
    above = name.lower().split(".")[:-1]
    return any("attn" in part or "attention" in part for part in above)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives the logits, None where the model does not say."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if callable(get) else None
    except NotImplementedError:
        return None
