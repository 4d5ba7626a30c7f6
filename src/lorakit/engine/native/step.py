"""A decoding step as one call of compiled C++ (`decode_step.cpp`), for plain models on a CPU.

A step of a small model reads its weights once, and that is nearly all that it should take: all
layers are one parallel region, no Python runs between them, and weights are read as they lie in
the modules. A short prompt is a step with several tokens of a row. Models in bfloat16 and float32,
with weights of that dtype or as `--weights` rounds them; every other one, and every row that needs
more, is computed by PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p, pointer
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from lorakit.engine.cache import RowCache
from lorakit.engine.decoder_shape import DecoderShape, Norm, Products
from lorakit.engine.native.library import library
from lorakit.lora.columns import Plan
from lorakit.lora.layer_family import Family
from lorakit.models.quantization.rounded_linear import RoundedLinear, RoundedWeight
from lorakit.weight_formats import format_of

_LONGEST, _LONGEST_BY_TILES = 32, 256

_KINDS: dict[object, int] = {torch.float32: 0, torch.bfloat16: 1, "int8": 2, "int4": 3}


class _Linear(Structure):
    _fields_ = (
        ("kind", c_int64),
        ("w", c_void_p),
        ("stride", c_int64),
        ("d_in", c_int64),
        ("d_out", c_int64),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("a", c_void_p),
        ("b", c_void_p),
        ("b_stride", c_int64),
        ("family", c_int64),
        ("place", c_int64),
    )


class _Layer(Structure):
    _fields_ = (
        ("qkv", _Linear * 3),
        ("out", _Linear),
        ("gate_up", _Linear * 2),
        ("down", _Linear),
        *((name, c_void_p) for name in ("before", "after", "q_norm", "k_norm")),
        *((name, c_float) for name in ("before_eps", "after_eps", "q_eps", "k_eps")),
    )


class _Model(Structure):
    _fields_ = (
        *((n, c_int64) for n in ("kind", "layers", "width", "d", "heads", "kv_heads", "inner")),
        ("scale", c_float),
        ("norm_eps", c_float),
        ("layer", POINTER(_Layer)),
        ("norm", c_void_p),
        ("head", _Linear),
    )


class _Adapter(Structure):
    _fields_ = (("begin", c_int64), ("width", c_int64))


class _Tokens(Structure):
    _fields_ = (
        ("tokens", c_int64),
        ("threads", c_int64),
        ("embedded", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rows", c_void_p),
        ("lengths", c_void_p),
        ("keys", POINTER(c_void_p)),
        ("values", POINTER(c_void_p)),
        ("room", c_int64),
        ("adapters", c_int64),
        ("adapter", POINTER(_Adapter)),
        ("adapter_of", POINTER(c_int64)),
        ("asked", c_int64),
        ("which", c_void_p),
        ("logits", c_void_p),
    )


@dataclass(frozen=True)
class Tokens:
    """Which tokens a step computes, row after row.

    Attributes:
        rows: (tokens,), in whose place of the cache each goes.
        lengths: (tokens,), how many tokens its row has before it.
        asked: the tokens whose logits are asked for, the last of each row (rows,) or all of them.
        counts: how many tokens each row has.
    """

    rows: torch.Tensor
    lengths: torch.Tensor
    asked: torch.Tensor
    counts: tuple[int, ...]

    @classmethod
    def newest(cls, lengths: torch.Tensor) -> Tokens:
        """One of each row, behind its `lengths` (rows,)."""
        rows = torch.arange(len(lengths))
        return cls(rows, lengths, rows, (1,) * len(lengths))

    @classmethod
    def several(
        cls, first: int, counts: Sequence[int], starts: Sequence[int], every: bool = False
    ) -> Tokens:
        """So many of each row from `first` on, from these positions on; `every` one is asked."""
        several = torch.tensor(counts)
        rows = torch.arange(first, first + len(counts)).repeat_interleave(several)
        ends = several.cumsum(0)
        begins = (torch.tensor(starts) - ends + several).repeat_interleave(several)
        numbers = torch.arange(len(rows))
        return cls(rows, numbers + begins, numbers if every else ends - 1, tuple(counts))


class NativeStep:
    """The step of one model, where it is as plain as the C++ takes it.

    Args:
        shape: the model's.

    Attributes:
        why_not: why PyTorch computes each step all the same; empty where it need not.
        longest: so many tokens of a row at most: more are computed faster by PyTorch.

    Raises:
        ValueError: it is not.
    """

    def __init__(self, shape: DecoderShape) -> None:
        self._shape = shape
        self.dtype: torch.dtype = shape.embed.weight.dtype
        first = shape.layers[0]
        self._d, self._heads = first.d, first.q // first.d
        self._kv_heads = first.turned // first.d - self._heads
        self._inner, self._scale = first.wide, first.scale
        for layer in shape.layers:
            same = (layer.d, layer.q, layer.wide, layer.scale) == (
                first.d,
                first.q,
                first.wide,
                first.scale,
            )
            if not same or layer.turned != first.turned or layer.act is not silu or layer.d % 16:
                raise ValueError("layers of other kinds")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError("another dtype")
        self._linears = [linear for own in shape.products() for linear in own.layers]
        if (
            not all(map(self._is_plain, self._linears))
            or self.dtype != shape.norm.module.weight.dtype
        ):
            raise ValueError("weights of other kinds")
        self._places: tuple[int, ...] = ()
        self._model: _Model | None = None
        self._plan: Plan | None = None
        self._counts: tuple[int, ...] = ()
        self._ranges: Any = ()
        self._adapter_of: Any = ()
        self.why_not, compiled = library().why_not, library().functions
        by_tiles = compiled is not None and self.dtype == torch.bfloat16 and compiled.has_tiles()
        self.longest = _LONGEST_BY_TILES if by_tiles else _LONGEST

    def _is_plain(self, layer: Any) -> bool:
        weight = layer.weight
        own = type(layer) is nn.Linear and format_of(weight) is None and weight.dtype == self.dtype
        return (
            (own or type(layer) is RoundedLinear)
            and weight.device.type == "cpu"
            and weight.stride(1) == 1
            and (layer.bias is None or layer.bias.dtype == self.dtype)
            and not layer._forward_hooks
            and not layer._forward_pre_hooks
        )

    def forget(self) -> None:
        """Has factors looked up anew, as they may have moved."""
        self._places, self._plan, self._counts = (), None, ()

    def __call__(
        self,
        cache: RowCache,
        tokens: Tokens,
        h: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        plan: Plan | None,
    ) -> torch.Tensor | None:
        """The logits (asked, vocabulary), or None where PyTorch is to compute this step.

        Args:
            h: the embedded tokens (tokens, width).
            turns: cosines and sines (tokens, 1, d) of their positions.
        """
        compiled = library().functions
        if not compiled or h.dtype != self.dtype:
            return None
        layers: Sequence[Any] = cache.layers
        for own in layers:
            if not own.is_initialized:
                like = h.new_empty(1, self._kv_heads, 1, self._d)
                own.lazy_initialization(like, like)
        if not all(own.keys.dtype == self.dtype for own in layers):
            return None
        model = self._described()
        if model is None:
            return None
        cos, sin = (turn.float().contiguous() for turn in turns)
        adapters, adapter_of = self._adapters(plan, tokens.counts)
        logits = h.new_empty(len(tokens.asked), model.head.d_out)
        h = h.contiguous()
        asked = _Tokens(
            tokens=len(h),
            threads=torch.get_num_threads(),
            embedded=h.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            rows=tokens.rows.data_ptr(),
            lengths=tokens.lengths.data_ptr(),
            keys=_pointers(own.keys for own in layers),
            values=_pointers(own.values for own in layers),
            room=layers[0].keys.shape[2],
            adapters=len(adapters),
            adapter=adapters,
            adapter_of=adapter_of,
            asked=len(tokens.asked),
            which=tokens.asked.data_ptr(),
            logits=logits.data_ptr(),
        )
        assert compiled is not None
        compiled.decode_step(pointer(model), pointer(asked))
        return logits

    def _adapters(self, plan: Plan | None, counts: tuple[int, ...]) -> tuple[Any, Any]:
        """The columns of the adapters, and which of these each token has.

        Args:
            counts: how many tokens each row has.
        """
        if plan is not self._plan or counts != self._counts:
            parts = () if plan is None else plan.parts
            ranges = sorted({(part.begin, part.end) for part in parts})
            of_row = [-1] * len(counts)
            for part in parts:
                # One adapter for all rows has no first and last.
                span = slice(None) if plan and plan.rows == 1 else slice(part.first, part.last)
                found = ranges.index((part.begin, part.end))
                of_row[span] = [found] * len(of_row[span])
            self._plan, self._counts = plan, counts
            self._ranges = (_Adapter * len(ranges))(*(_Adapter(a, b - a) for a, b in ranges))
            of_tokens = chain.from_iterable(map(repeat, of_row, counts))
            self._adapter_of = (c_int64 * sum(counts))(*of_tokens)
        return self._ranges, self._adapter_of

    def _described(self) -> _Model | None:
        """Where everything lies; None where a weight is of another kind than it was."""
        places = tuple(layer.weight.data_ptr() for layer in self._linears)
        if places != self._places:
            self._places, self._model = places, None
            if all(map(self._is_plain, self._linears)):
                self._model = self._description()
        return self._model

    def _description(self) -> _Model:
        shape = self._shape
        layers = (_Layer * len(shape.layers))()
        for own, layer in zip(layers, shape.layers, strict=True):
            own.qkv[:], own.gate_up[:] = _linears(layer.qkv), _linears(layer.gate_up)
            [own.out], [own.down] = _linears(layer.out), _linears(layer.down)
            norms: dict[str, Norm | None] = {
                "before": layer.before,
                "after": layer.after,
                "q": layer.q_norm,
                "k": layer.k_norm,
            }
            for name, norm in norms.items():
                if norm is not None:
                    field = name if name in ("before", "after") else f"{name}_norm"
                    setattr(own, field, norm.module.weight.data_ptr())
                    setattr(own, f"{name}_eps", norm.eps)
        [head] = _linears(shape.head)
        return _Model(
            kind=_KINDS[self.dtype],
            layers=len(layers),
            width=shape.embed.embedding_dim,
            d=self._d,
            heads=self._heads,
            kv_heads=self._kv_heads,
            inner=self._inner,
            scale=self._scale,
            norm_eps=shape.norm.eps,
            layer=layers,
            norm=shape.norm.module.weight.data_ptr(),
            head=head,
        )


def _linears(products: Products) -> list[_Linear]:
    return [_linear(layer, *own) for layer, own in zip(products.layers, products.each, strict=True)]


def _linear(layer: Any, family: Family | None, place: int) -> _Linear:
    weight = layer.weight
    is_rounded = isinstance(weight, RoundedWeight)
    made = _Linear(
        kind=_KINDS[weight.form if is_rounded else weight.dtype],
        w=weight.data_ptr(),
        stride=weight.stride(0),
        d_in=layer.in_features,
        d_out=layer.out_features,
        family=1,
    )
    if is_rounded:
        made.scales = weight.scales.data_ptr()
    if layer.bias is not None:
        made.bias = layer.bias.data_ptr()
    if family is not None:
        A, B = family.factors(place)
        if len(A):
            made.a, made.b, made.b_stride = A.data_ptr(), B.data_ptr(), B.stride(0)
            made.family, made.place = len(family.layers), place
    return made


def _pointers(tensors: Iterable[torch.Tensor]) -> Any:
    places = [tensor.data_ptr() for tensor in tensors]
    return (c_void_p * len(places))(*places)
