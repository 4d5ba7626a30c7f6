"""LoRA beside a linear layer, `nn.Linear` or GPT-2's `Conv1D`."""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.lora.architecture import is_conv1d
from lorakit.lora.config import LoraConfig
from lorakit.lora.kernels import Weight, lora_linear
from lorakit.lora.layer_family import Family
from lorakit.lora.layers.layer import LoraLayer
from lorakit.lora.routing import Route, Routing
from lorakit.lora.spans import Span, lora_spans

_PRODUCTS: dict[type[nn.Module], bool] = {nn.Linear: True}
"""Whether layers of a class compute their product and nothing else, as far as it is known."""


def is_product(module: nn.Module) -> bool:
    """Whether an `nn.Linear` gives (…, d_out) for (…, d_in).

    Not believed but tried where a subclass computes by itself: routers of mixtures (Llama 4, Phi
    3.5) return more than a product, and grouped layers (DeepSeek V4) take inputs of another shape.
    """
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    if kind not in _PRODUCTS:
        x = module.weight.new_zeros(2, module.in_features)
        try:
            with torch.no_grad():
                y = module(x)
            _PRODUCTS[kind] = isinstance(y, torch.Tensor) and y.shape == (2, module.out_features)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            _PRODUCTS[kind] = False
    return _PRODUCTS[kind]


class LoraLinear(LoraLayer):
    """`y = x W^T + b + scaling * dropout(x) A^T B^T` beside a frozen linear layer.

    Usable alone: `LoraLinear(nn.Linear(512, 512), r=8, lora_alpha=16)` has one adapter, named
    `default`, active. GPT-2's `Conv1D`, which stores its weight (in, out), is a base layer too.

    Args:
        base_layer: the layer to freeze; x (..., d_in) to y (..., d_out).
        r: the rank; None starts with an empty bank.
        options: further fields of `LoraConfig` (`lora_alpha`, `lora_dropout`, `use_dora`, …).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int | None = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        fan_in_fan_out: bool | None = None,
        routing: Routing | None = None,
        **options: Any,
    ) -> None:
        super().__init__(base_layer, routing)
        self.family: Family | None = None
        """The packed factors of adapters of this layer, and of others with the same input."""
        self.place = 0
        """Its place among the layers of the family."""
        self.fan_in_fan_out = is_conv1d(base_layer) if fan_in_fan_out is None else fan_in_fan_out
        self.stored_transposed = self.fan_in_fan_out
        self.out_features, self.in_features = self._shape()
        if r is not None:
            config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, **options)
            self.add_adapter("default", config)
            self.routing.route = Route(shared=("default",))

    @classmethod
    def from_base(cls, base_layer: nn.Module, routing: Routing) -> Self:
        """An empty bank around `base_layer`, on a model's shared routing."""
        return cls(base_layer, r=None, routing=routing)

    def _shape(self) -> tuple[int, int]:
        """The number of outputs and of inputs."""
        d_out, d_in = self._as_matrix(self.base_weight).shape
        return d_out, d_in

    def _create(self, name: str, r: int, bias: bool, **placement: Any) -> None:
        self.lora_A[name] = _unfilled(self.in_features, r, False, **placement)
        self.lora_B[name] = _unfilled(r, self.out_features, bias, **placement)

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def _as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.T if self.fan_in_fan_out else matrix

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus the update of the adapters on the route."""
        family = self.family
        if family is None or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        y = family.output(x, self.place, self.routing)
        if y is None:
            return super().forward(x, *args, **kwargs)
        if family.has_others:
            for rows, name in family.others(x, self.place, self.r):
                y[rows] += self._update(x[rows], y[rows], name).to(y.dtype)
        return y

    def values_changed(self, name: str) -> None:
        super().values_changed(name)
        if self.family is not None:
            self.family.drop(name, self.place)

    def packed_factors(
        self, name: str, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (n, d_in) and B (d_out, n) whose product is all that adapter `name` adds; else None.

        Args:
            dtype: to which they are rounded next.
        """
        if (
            name not in self.r
            or self.bias_update(name) is not None
            or self._magnitude(name) is not None
        ):
            return None
        (A, B), scaling = self.factors(name), self.scaling[name]
        if scaling == 1:
            return A, B
        if B.dtype != dtype:  # else this product is rounded to it, as a copy would be
            B = B.to(torch.promote_types(B.dtype, torch.float32))
        return A, B * scaling

    @torch.no_grad()
    def fold_scaling(self, name: str) -> None:
        """Multiplies B of adapter `name` by its scaling, where that is all that it scales."""
        if self.bias_update(name) is None and name not in self.lora_initial:
            self.matrices(name)[1].mul_(self.scaling[name])
            self.rescale(name, self.lora_alpha[name], 1.0)

    def _forward_shared(
        self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if len(names) != 1 or not self.is_plain(x, names[0]):
            return super()._forward_shared(x, names, *args, **kwargs)
        scaling, p = self.scaling[names[0]], self.share_dropped(names[0])
        factors = self.factors(names[0])
        return lora_linear(x, self._frozen_weight(x), self.base_layer.bias, *factors, scaling, p)

    def _forward_parts(
        self, x: torch.Tensor, route: Route, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        names = [name for name in route.row_names if name in self.r]
        if not all(self.is_plain(x, name) for name in names):
            return super()._forward_parts(x, route, *args, **kwargs)
        dim, parts = route.parts(x)
        # Parts of rows are as many positions as the rows have; a line has one each.
        each = math.prod(x.shape[dim + 1 : -1])
        end = 0
        spans: list[Span] = []
        factors: list[torch.Tensor] = []
        for name, size, width, stream in parts:
            begin, end = end, end + each * size
            if name in self.r:
                rows = None if width is None or route.shape is None else (route.shape[1], width)
                scaling, p = self.scaling[name], self.share_dropped(name)
                spans.append(Span(begin, end, scaling, p, stream, rows))
                factors += self.factors(name)
        return lora_spans(x, self._frozen_weight(x), self.base_layer.bias, spans, factors)

    def _frozen_weight(self, x: torch.Tensor) -> Weight:
        """The weight (d_out, d_in) for products with x."""
        return self.base_layer.weight

    def share_dropped(self, name: str) -> float:
        """The share of its input's entries that adapter `name` does not see now."""
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _low_rank(self, x: torch.Tensor, name: str) -> torch.Tensor:
        A, B = self.factors(name)
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * self.scaling[name]

    def _base_product(
        self, x: torch.Tensor, y: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        if dropped is not x:
            return F.linear(dropped, self._as_matrix(self.base_weight))
        bias = self.base_bias
        return y if bias is None else y - bias

    def is_plain(self, x: torch.Tensor, name: str) -> bool:
        """Whether the fused function computes what the plain formula would, for x's dtype."""
        base = self.base_layer
        bias = getattr(base, "bias", None)
        return (
            self._plain_products(x)
            and not base.weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and self.lora_B[name].bias is None
            and name not in self.lora_magnitude_vector
            and not torch.is_autocast_enabled(x.device.type)
            and "forward" not in vars(base)  # accelerate replaces it to move weights
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
        )

    def _plain_products(self, x: torch.Tensor) -> bool:
        """Whether the base is `x W^T + b` in x's dtype and nothing else."""
        base = self.base_layer
        return type(base) is nn.Linear and not self.fan_in_fan_out and x.dtype == base.weight.dtype


def _unfilled(d_in: int, d_out: int, bias: bool, **placement: Any) -> nn.Linear:
    """A linear layer with any values: `_initialize` fills them.

    As `nn.utils.skip_init` gives, which inspects signatures and fills values on the meta device
    first: for the layers of a small model that takes as long as all the rest of a new adapter.
    """
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = d_in, d_out
    layer.weight = nn.Parameter(torch.empty(d_out, d_in, **placement))
    layer.register_parameter(
        "bias", nn.Parameter(torch.empty(d_out, **placement)) if bias else None
    )
    return layer
