"""New tokens of each row, by one function in the place of a Llama-shaped model's modules.

A step of a small model is a few hundred small operations, and what transformers' modules do between
them takes as long as the products. Here a layer is four products (queries, keys and values in one,
gate and up in one; with their adapters, `lora/packed.py`), attention over a `RowCache`, and what
lies between. Where a C++ compiler is found, all of it is one call (`native/`), which reads short
prompts too. Which models have
this shape is told by their modules, and then tried against the model's own forward (`carried.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from lorakit.engine.cache import RowCache
from lorakit.engine.decoder_shape import DecoderLayer, DecoderShape
from lorakit.engine.native.step import NativeStep, Tokens
from lorakit.engine.row_layers.place import Place
from lorakit.lora.columns import Plan
from lorakit.lora.joining import is_packed
from lorakit.lora.packed import PackedFactors
from lorakit.lora.routing import BASE, Route


class DecodeStep:
    """The step of a model whose modules are those of Llama, Mistral, Qwen 2 and 3, and the like.

    Args:
        model: a causal language model, with wrapped modules or without.

    Attributes:
        native: computes it in C++ where it can; None where the model has something else.
        longest_prompt: so many tokens of a prompt at most are read here: 0 for newest tokens alone.

    Raises:
        ValueError: it has other modules.
    """

    def __init__(self, model: Any) -> None:
        self._shape = DecoderShape(model)
        self._model = model
        self._found: tuple[PackedFactors | None, int] | None = None  # whose factors are looked up
        self._packed_names: dict[str, bool] = {}
        self.native: NativeStep | None = None
        self.longest_prompt = 0
        self._is_proved = False
        with suppress(ValueError):
            self.native = NativeStep(self._shape)

    @property
    def why_not_native(self) -> str:
        """Why PyTorch computes what C++ could; empty where it need not."""
        return "" if self.native is None else self.native.why_not

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
        key = packed, 0 if packed is None else packed.version
        if self._found == key:
            return
        by_layer = {} if packed is None else packed.by_layer()
        for products in self._shape.products():
            products.find(by_layer)
        if self.native is not None:
            self.native.forget()
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
        h = self._shape.embed(ids[:, 0])
        plan = None if packed is None else packed.plan(route or Route(), h)
        cos, sin = self._shape.rotary(h, inputs["position_ids"])
        found = None
        lengths = _place(cache).lengths
        if self.native is not None and lengths is not None:
            found = self.native(cache, Tokens.newest(lengths), h, (cos, sin), plan)
        if found is not None and self._is_proved:
            return found
        logits = self._by_torch(cache, h, (cos, sin), inputs["attention_mask"], plan)
        if found is not None:
            self._judge(found, logits)
        return logits

    def of_prompts(
        self,
        cache: RowCache,
        inputs: dict[str, Any],
        route: Route | None = None,
        packed: PackedFactors | None = None,
        *,
        every: bool = False,
    ) -> torch.Tensor | None:
        """The logits (rows, vocabulary) of the last tokens of prompts, or of parts of them; None
        where the model is to compute them. Arguments as in `__call__`, of the cache's other ways.

        Args:
            every: of all tokens (tokens, vocabulary), row after row.
        """
        ids, place = inputs["input_ids"], _place(cache)
        counts = place.prompts or [ids.shape[1]]
        if self.native is None or max(counts) > self.longest_prompt:
            return None
        starts = place.starts or [place.start] * len(counts)
        own = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(counts)[:, None]
        h = self._shape.embed(ids[own])
        plan = None if packed is None else packed.plan(route or Route(), ids[..., None])
        turns = self._shape.rotary(h, inputs["position_ids"].expand_as(ids)[own][:, None])
        tokens = Tokens.several(place.row, counts, starts, every)
        return self.native(cache, tokens, h, turns, plan)

    def prove_prompts(self, is_right: Callable[[], bool]) -> None:
        """Has prompts be read here from now on, unless `is_right` says that `of_prompts` is not."""
        if self.native is not None and self._is_proved:
            self.longest_prompt = self.native.longest
            if not is_right():
                self.longest_prompt = 0

    def _judge(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Compares the first step in C++ with PyTorch's; one that differs is left out from here on.

        Args:
            found: logits (rows, vocabulary); rows with NaN or Inf tell nothing.
        """
        tell = found.isfinite().all(-1) & expected.isfinite().all(-1)
        own, others = found[tell].float(), expected[tell].float()
        if tell.any():
            allowed = max(32 * torch.finfo(found.dtype).eps, 1e-3)
            self._is_proved = bool((own - others).norm() <= allowed * others.norm())
            if not self._is_proved:
                self.native = None

    def _by_torch(
        self,
        cache: RowCache,
        h: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        seen: torch.Tensor,
        plan: Plan | None,
    ) -> torch.Tensor:
        cos, sin = turns
        half = sin.shape[-1] // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)  # x2 beside x1 is rotated by it
        mask = torch.zeros(seen.shape, dtype=h.dtype, device=h.device)
        mask.masked_fill_(seen.logical_not(), -torch.inf)
        for layer, kept in zip(self._shape.layers, cache.layers, strict=True):
            h = _through(layer, h, cos, sin, mask, kept, plan)
        return self._shape.head(self._shape.norm(h), plan)


def _place(cache: RowCache) -> Place:
    place: Place = cache.layers[0].place
    return place


def _through(
    layer: DecoderLayer,
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
