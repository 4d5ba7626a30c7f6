"""Which tensor of the original files is which of transformers' GLM.

One table serves loading, converting and writing an adapter back. Nothing is turned or permuted:
GLM's rotary pairs are neighbours in both, and its gate stands before its up-projection in both.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.models.layouts.chatglm.config import Original

if TYPE_CHECKING:
    from transformers import GlmConfig

UNUSED = frozenset({"transformer.rotary_pos_emb.inv_freq"})  # computed anew
QKV = "self_attention.query_key_value"
LAYERS = "transformer.encoder.layers"
_NATIVE_LAYER = "model.layers"

QKV_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""What `query_key_value` is in transformers, in the order of its rows."""

LAYER_MODULES = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
"""A layer's other modules by transformers' name."""

OTHER_MODULES = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
}
"""The modules outside the layers by transformers' name."""


@dataclass(frozen=True)
class Part:
    """A native tensor: the rows from `start` of the original tensor `name`, `shape[0]` of them."""

    name: str
    start: int
    shape: tuple[int, ...]


def parts(original: Original) -> dict[str, Part]:
    """Every native tensor by its name, in the model's order."""
    s = original.sizes
    hidden, inner, vocabulary = s["hidden_size"], s["ffn_hidden_size"], s["padded_vocab_size"]
    queries = original.qkv_rows[0]
    shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_up_proj": (2 * inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "model.embed_tokens": (vocabulary, hidden),
        "model.norm": (hidden,),
        "lm_head": (vocabulary, hidden),
    }
    found = {
        f"{native}.weight": Part(f"{name}.weight", 0, shapes[native])
        for native, name in OTHER_MODULES.items()
    }
    for layer in range(s["num_layers"]):
        start = 0
        for native, rows in zip(QKV_PARTS, original.qkv_rows, strict=True):
            own, theirs = f"{_NATIVE_LAYER}.{layer}.{native}", f"{LAYERS}.{layer}.{QKV}"
            found[f"{own}.weight"] = Part(f"{theirs}.weight", start, (rows, hidden))
            if original.has_qkv_bias:
                found[f"{own}.bias"] = Part(f"{theirs}.bias", start, (rows,))
            start += rows
        for native, name in LAYER_MODULES.items():
            part = Part(f"{LAYERS}.{layer}.{name}.weight", 0, shapes[native])
            found[f"{_NATIVE_LAYER}.{layer}.{native}.weight"] = part
    return found


def stored_shapes(original: Original) -> dict[str, tuple[int, ...]]:
    """The shapes that the original tensors must have, by their names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts(original).values():
        rows = max(part.start + part.shape[0], shapes.get(part.name, (0,))[0])
        shapes[part.name] = (rows, *part.shape[1:])
    return shapes


def original_module(native: str) -> tuple[str, str | None]:
    """The original module's path for a native one, and which part of `query_key_value` it is.

    Raises:
        KeyError: GLM has no such module.
    """
    if native in OTHER_MODULES:
        return OTHER_MODULES[native], None
    begin, _, rest = native.removeprefix(f"{_NATIVE_LAYER}.").partition(".")
    if native.startswith(f"{_NATIVE_LAYER}.") and begin.isdecimal():
        if rest in QKV_PARTS:
            return f"{LAYERS}.{begin}.{QKV}", rest
        if rest in LAYER_MODULES:
            return f"{LAYERS}.{begin}.{LAYER_MODULES[rest]}", None
    raise KeyError(native)


def native_modules(original: str) -> tuple[str, list[str], str]:
    """What an original module, or a tensor of one, is in transformers.

    Args:
        original: the module's path, or a tensor's name that begins with it.

    Returns: the original module's path, those of the native ones, and the rest of `original`.

    Raises:
        KeyError: there is no such module.
    """
    for native, path in OTHER_MODULES.items():
        if original == path or original.startswith(f"{path}."):
            return path, [native], original[len(path) + 1 :]
    parts = {QKV: QKV_PARTS, **{path: (native,) for native, path in LAYER_MODULES.items()}}
    known = "|".join(map(re.escape, parts))
    match = re.fullmatch(rf"{re.escape(LAYERS)}\.(\d+)\.({known})(?:\.(.+))?", original)
    if match is None:
        raise KeyError(original)
    layer, path, rest = match.groups()
    natives = [f"{_NATIVE_LAYER}.{layer}.{native}" for native in parts[path]]
    return f"{LAYERS}.{layer}.{path}", natives, rest or ""


def native_names(original: str) -> list[str]:
    """The last parts of the native modules' names for that of an original one's, or for its path.

    A name that is none of them stays as it is.
    """
    every = {**OTHER_MODULES, **LAYER_MODULES, **dict.fromkeys(QKV_PARTS, QKV)}
    last = original.rpartition(".")[2]
    found = [n.rpartition(".")[2] for n, o in every.items() if o.rpartition(".")[2] == last]
    return list(dict.fromkeys(found)) or [original]


def qkv_rows(config: GlmConfig) -> tuple[int, int, int]:
    """How many rows of `query_key_value` are the queries', the keys' and the values'."""
    keys = config.num_key_value_heads * config.head_dim
    return config.num_attention_heads * config.head_dim, keys, keys
