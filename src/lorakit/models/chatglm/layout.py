"""Which tensor of the original files is which of transformers' GLM.

One table serves loading, converting and writing an adapter back. Nothing is turned or permuted:
GLM's rotary pairs are neighbours in both, and its gate stands before its up-projection in both.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.models.chatglm.config import Original

UNUSED = frozenset({"transformer.rotary_pos_emb.inv_freq"})  # computed anew
QKV = "self_attention.query_key_value"
_LAYER, _NATIVE_LAYER = "transformer.encoder.layers", "model.layers"

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
            own, theirs = f"{_NATIVE_LAYER}.{layer}.{native}", f"{_LAYER}.{layer}.{QKV}"
            found[f"{own}.weight"] = Part(f"{theirs}.weight", start, (rows, hidden))
            if original.has_qkv_bias:
                found[f"{own}.bias"] = Part(f"{theirs}.bias", start, (rows,))
            start += rows
        for native, name in LAYER_MODULES.items():
            part = Part(f"{_LAYER}.{layer}.{name}.weight", 0, shapes[native])
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
            return f"{_LAYER}.{begin}.{QKV}", rest
        if rest in LAYER_MODULES:
            return f"{_LAYER}.{begin}.{LAYER_MODULES[rest]}", None
    raise KeyError(native)
