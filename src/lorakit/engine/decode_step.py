"""One token of each row, by one function in the place of a Llama-shaped model's modules.

A step of a small model is a few hundred small operations, and what transformers' modules do between
them takes as long as the products. Here a layer is four products (queries, keys and values in one,
gate and up in one; with their adapters, `lora/packed.py`), attention over a `RowCache`, and what
lies between. Which models have this shape is told by their modules, and then tried against the
model's own forward (`carried.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

from lorakit.engine.cache import RowCache
from lorakit.lora.columns import Plan
from lorakit.lora.joining import is_packed
from lorakit.lora.layers import unwrapped
from lorakit.lora.packed import Family, PackedFactors
from lorakit.lora.routing import BASE, Route

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class _Norm:
    """`w * x / sqrt(mean(x²) + eps)`, computed in float32 as Llama does."""

    def __init__(self, module: Any) -> None:
        module = unwrapped(module)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if "RMSNorm" not in type(module).__name__ or not isinstance(eps, float):
            raise ValueError(f"a {type(module).__name__}")
        self._module, self._eps = module, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = (wide.pow(2).mean(-1, keepdim=True) + self._eps).rsqrt_()
        y: torch.Tensor = self._module.weight * (wide * scale).to(x.dtype)
        return y


class _Products:
    """Linear layers of one input, side by side: (rows, d_in) to (rows, all d_out)."""

    def __init__(self, *layers: Any) -> None:
        self.layers: list[Any] = [unwrapped(layer) for layer in layers]
        if not all(isinstance(layer, nn.Linear) for layer in self.layers):
            raise ValueError("a linear layer of another kind")
        self._family: Family | None = None
        self._each: list[tuple[Family | None, int]] = [(None, 0)] * len(layers)

    def find(self, families: dict[int, Family]) -> None:
        """Looks up who computes each layer now, by its id: a family, or the layer itself."""
        found = [families.get(id(layer)) for layer in self.layers]
        self._family = found[0]
        if self._family is None or not _same(self._family.layers, self.layers):
            self._family = None
        self._each = [
            (family, 0 if family is None else _place(family.layers, layer))
            for family, layer in zip(found, self.layers, strict=True)
        ]

    def __call__(self, x: torch.Tensor, plan: Plan | None) -> torch.Tensor:
        if self._family is not None and plan is not None:
            return self._family.computed(x, plan)
        outputs: list[torch.Tensor] = []
        known: dict[int, Sequence[torch.Tensor]] = {}
        for layer, (family, place) in zip(self.layers, self._each, strict=True):
            if family is None or plan is None:
                outputs.append(layer(x))
                continue
            if id(family) not in known:
                known[id(family)] = family.computed(x, plan).split(family.sizes, -1)
            outputs.append(known[id(family)][place])
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A decoder layer. `q_norm` and `k_norm` are those of each head (Qwen 3)."""

    before: _Norm
    qkv: _Products
    q_norm: _Norm | None
    k_norm: _Norm | None
    out: _Products
    after: _Norm
    gate_up: _Products
    act: Callable[[torch.Tensor], torch.Tensor]
    down: _Products
    d: int
    turned: int
    """How many numbers of queries and keys a token has, which are rotated."""
    q: int
    """How many of them are the queries'."""
    wide: int
    scale: float

    def products(self) -> list[_Products]:
        return [self.qkv, self.out, self.gate_up, self.down]


class DecodeStep:
    """The step of a model whose modules are those of Llama, Mistral, Qwen 2 and 3, and the like.

    Args:
        model: a causal language model, with wrapped modules or without.

    Raises:
        ValueError: it has other modules.
    """

    def __init__(self, model: Any) -> None:
        body = model.get_decoder()
        self._embed, self._rotary = unwrapped(body.embed_tokens), body.rotary_emb
        if type(self._embed) is not nn.Embedding:
            raise ValueError("an embedding of another kind")
        self._layers = [_layer(layer) for layer in body.layers]
        self._norm, self._head = _Norm(body.norm), _Products(model.lm_head)
        self._model = model
        self._found: tuple[int, int] | None = None  # for which packed factors products are found
        self._packed_names: dict[str, bool] = {}

    def serves(self, route: Route, packed: PackedFactors | None) -> bool:
        """Whether it computes rows with this route: adapters whose factors are all packed."""
        names = {*(route.rows or route.shared)} - {BASE}
        if len(route.shared) > 1 or route.sizes is not None or torch.is_grad_enabled():
            return False
        self._find(packed)
        if packed is None:
            return not names
        for name in names - self._packed_names.keys():
            self._packed_names[name] = is_packed(self._model, name)
        return all(self._packed_names[name] for name in names)

    def _find(self, packed: PackedFactors | None) -> None:
        key = (id(packed), 0 if packed is None else packed.version)
        if self._found == key:
            return
        by_layer = {} if packed is None else packed.by_layer()
        for products in (self._head, *(own for layer in self._layers for own in layer.products())):
            products.find(by_layer)
        self._found, self._packed_names = key, {}

    def __call__(
        self,
        cache: RowCache,
        inputs: dict[str, Any],
        route: Route | None = None,
        packed: PackedFactors | None = None,
    ) -> torch.Tensor:
        """The logits (rows, vocabulary) of the tokens that `cache.newest_tokens` was asked for.

        Args:
            inputs: what it gave.
            route: one that `serves` has found good, of `packed` adapters.
        """
        ids: torch.Tensor = inputs["input_ids"]
        h = self._embed(ids[:, 0])
        plan = None if packed is None else packed.plan(route or Route(), h)
        cos, sin = self._rotary(h, inputs["position_ids"])
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # x2 beside x1 is rotated by it
        seen = inputs["attention_mask"]
        mask = torch.zeros(seen.shape, dtype=h.dtype, device=h.device)
        mask.masked_fill_(seen.logical_not(), -torch.inf)
        for layer, kept in zip(self._layers, cache.layers, strict=True):
            h = _through(layer, h, cos, sin, mask, kept, plan)
        return self._head(self._norm(h), plan)


def _through(
    layer: _Layer,
    h: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor,
    kept: Any,
    plan: Plan | None,
) -> torch.Tensor:
    """What a layer makes of h (rows, width); cos and sin (rows, 1, d), mask (rows, 1, 1, seen)."""
    rows = len(h)
    y = layer.qkv(layer.before(h), plan)
    qk = y[:, : layer.turned].view(rows, -1, layer.d)
    heads = layer.q // layer.d
    if layer.q_norm is not None and layer.k_norm is not None:
        qk = torch.cat((layer.q_norm(qk[:, :heads]), layer.k_norm(qk[:, heads:])), 1)
    qk = (qk * cos).add_(qk.roll(layer.d // 2, -1).mul_(sin))
    k, v = qk[:, heads:], y[:, layer.turned :].view(rows, -1, layer.d)
    keys, values = kept.take_newest(k, v)
    q = qk[:, :heads].reshape(rows, k.shape[1], -1, layer.d)  # heads that share keys are queries
    a = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=layer.scale)
    h = h + layer.out(a.reshape(rows, -1), plan)
    y = layer.gate_up(layer.after(h), plan)
    inner = layer.act(y[:, : layer.wide]).mul_(y[:, layer.wide :])
    return h + layer.down(inner, plan)


def _layer(module: Any) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    parts = {name for name, _ in attention.named_children()}
    known = _named(module) == _LAYER and _named(mlp) == _MLP
    if not known or not _ATTENTION <= parts <= _ATTENTION | _HEAD_NORMS:
        raise ValueError("layers of other parts")
    for own in (module, attention, mlp):
        if own._forward_hooks or own._forward_pre_hooks or "forward" in vars(own):
            raise ValueError("a hook")
    qkv = _Products(attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (layer.out_features for layer in qkv.layers)
    d = int(attention.head_dim)
    gate_up = _Products(mlp.gate_proj, mlp.up_proj)
    if k != v or q % k or k % d or d % 2:
        raise ValueError("heads of other sizes")
    norms = _HEAD_NORMS & parts
    act = silu if isinstance(mlp.act_fn, nn.SiLU) or _is_silu(mlp.act_fn) else mlp.act_fn
    return _Layer(
        before=_Norm(module.input_layernorm),
        qkv=qkv,
        q_norm=_Norm(attention.q_norm) if norms else None,
        k_norm=_Norm(attention.k_norm) if norms else None,
        out=_Products(attention.o_proj),
        after=_Norm(module.post_attention_layernorm),
        gate_up=gate_up,
        act=act,
        down=_Products(mlp.down_proj),
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
