"""What a Llama-shaped model is made of, found in its modules.

Two functions compute a decoding step from it: `decode_step.py` by PyTorch, `native/step.py` by
compiled C++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from lorakit.lora.columns import Plan
from lorakit.lora.layer_family import Family
from lorakit.lora.layers import unwrapped

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class Norm:
    """`w * x / sqrt(mean(x²) + eps)`, computed in float32 as Llama does."""

    def __init__(self, module: Any) -> None:
        module = unwrapped(module)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if "RMSNorm" not in type(module).__name__ or not isinstance(eps, float):
            raise ValueError(f"a {type(module).__name__}")
        self.module, self.eps = module, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = (wide.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt_()
        y: torch.Tensor = self.module.weight * (wide * scale).to(x.dtype)
        return y


class Products:
    """Linear layers of one input, side by side: (rows, d_in) to (rows, all d_out)."""

    def __init__(self, *layers: Any) -> None:
        self.layers: list[Any] = [unwrapped(layer) for layer in layers]
        if not all(isinstance(layer, nn.Linear) for layer in self.layers):
            raise ValueError("a linear layer of another kind")
        self._family: Family | None = None
        self.each: list[tuple[Family | None, int]] = [(None, 0)] * len(layers)
        """The family of each layer, if it is in one, and its place there."""

    def find(self, families: dict[int, Family]) -> None:
        """Looks up who computes each layer now, by its id: a family, or the layer itself."""
        found = [families.get(id(layer)) for layer in self.layers]
        self._family = found[0]
        if self._family is None or not _same(self._family.layers, self.layers):
            self._family = None
        self.each = [
            (family, 0 if family is None else _place(family.layers, layer))
            for family, layer in zip(found, self.layers, strict=True)
        ]

    def __call__(self, x: torch.Tensor, plan: Plan | None) -> torch.Tensor:
        if self._family is not None and plan is not None:
            return self._family.computed(x, plan)
        outputs: list[torch.Tensor] = []
        known: dict[int, Sequence[torch.Tensor]] = {}
        for layer, (family, place) in zip(self.layers, self.each, strict=True):
            if family is None or plan is None:
                outputs.append(layer(x))
                continue
            if id(family) not in known:
                known[id(family)] = family.computed(x, plan).split(family.sizes, -1)
            outputs.append(known[id(family)][place])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """A decoder layer. `q_norm` and `k_norm` are those of each head (Qwen 3)."""

    before: Norm
    qkv: Products
    q_norm: Norm | None
    k_norm: Norm | None
    out: Products
    after: Norm
    gate_up: Products
    act: Callable[[torch.Tensor], torch.Tensor]
    down: Products
    d: int
    turned: int
    """How many numbers of queries and keys a token has, which are rotated."""
    q: int
    """How many of them are the queries'."""
    wide: int
    scale: float

    def products(self) -> list[Products]:
        return [self.qkv, self.out, self.gate_up, self.down]


class DecoderShape:
    """The parts of Llama, Mistral, Qwen 2 and 3, and the like.

    Args:
        model: a causal language model, with wrapped modules or without.

    Raises:
        ValueError: it has other modules.
    """

    def __init__(self, model: Any) -> None:
        body = model.get_decoder()
        self.embed, self.rotary = unwrapped(body.embed_tokens), body.rotary_emb
        if type(self.embed) is not nn.Embedding:
            raise ValueError("an embedding of another kind")
        self.layers = [_layer(layer) for layer in body.layers]
        self.norm, self.head = Norm(body.norm), Products(model.lm_head)

    def products(self) -> list[Products]:
        """Those of all layers, and the head."""
        return [self.head, *(own for layer in self.layers for own in layer.products())]


def _layer(module: Any) -> DecoderLayer:
    attention, mlp = module.self_attn, module.mlp
    parts = {name for name, _ in attention.named_children()}
    known = _named(module) == _LAYER and _named(mlp) == _MLP
    if not known or not _ATTENTION <= parts <= _ATTENTION | _HEAD_NORMS:
        raise ValueError("layers of other parts")
    for own in (module, attention, mlp):
        if own._forward_hooks or own._forward_pre_hooks or "forward" in vars(own):
            raise ValueError("a hook")
    qkv = Products(attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (layer.out_features for layer in qkv.layers)
    d = int(attention.head_dim)
    gate_up = Products(mlp.gate_proj, mlp.up_proj)
    if k != v or q % k or k % d or d % 2:
        raise ValueError("heads of other sizes")
    norms = _HEAD_NORMS & parts
    act = silu if isinstance(mlp.act_fn, nn.SiLU) or _is_silu(mlp.act_fn) else mlp.act_fn
    return DecoderLayer(
        before=Norm(module.input_layernorm),
        qkv=qkv,
        q_norm=Norm(attention.q_norm) if norms else None,
        k_norm=Norm(attention.k_norm) if norms else None,
        out=Products(attention.o_proj),
        after=Norm(module.post_attention_layernorm),
        gate_up=gate_up,
        act=act,
        down=Products(mlp.down_proj),
        d=d,
        turned=q + k,
        q=q,
        wide=gate_up.layers[0].out_features,
        scale=float(attention.scaling),
    )


def _named(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_silu(module: Any) -> bool:
    return type(module).__name__ == "SiLUActivation"


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _place(layers: Sequence[Any], layer: Any) -> int:
    return next(i for i, own in enumerate(layers) if own is layer)
