"""LoRA on a parameter itself, such as the stacked weights of a mixture's experts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers.layer import LoraLayer
from lorakit.lora.layers.linear import LoraLinear
from lorakit.lora.layers.weight_updates import RowUpdate
from lorakit.lora.routing import Route, Routing


class LoraParameter(LoraLayer):
    """A module one of whose parameters is `W + scaling * B A` while the module runs.

    The parameter is (d_out, d_in), or one such matrix an expert: (experts, d_out, d_in), or
    (experts, d_in, d_out) where the module says `is_transposed`. As in PEFT `lora_A[name].weight`
    is (experts * r, d_in), `lora_B[name].weight` (d_out, r * experts), and a module with several
    adapted parameters is wrapped once for each, the first innermost.
    """

    nesting = 1

    def __init__(
        self, base_layer: nn.Module, parameter_name: str, routing: Routing | None = None
    ) -> None:
        self.weight_name = parameter_name
        super().__init__(base_layer, routing)
        self.parameter_name = parameter_name
        weight = self.base_weight
        if weight.dim() not in (2, 3):
            raise InputError(
                f"target_parameters: {parameter_name} has {weight.dim()} dimensions, not 2 or 3"
            )
        self.num_experts = weight.shape[0] if weight.dim() == 3 else 1
        # As gpt-oss has them.
        own = getattr(self.get_base_layer(), "is_transposed", False)
        transposed = self._stored_transposed = weight.dim() == 3 and bool(own)
        self.out_features, self.in_features = (weight.mT if transposed else weight).shape[-2:]

    def _get_name(self) -> str:
        return "lora.ParamWrapper"  # PEFT's name for it

    def as_layer(self) -> LoraLinear:
        """A linear layer whose weight is adapted, as a layer with these adapters."""
        layer = LoraLinear.from_base(self.base_layer, self.routing)
        for attribute in self.by_name:
            getattr(layer, attribute).update(getattr(self, attribute))
        layer.merged_adapters, layer._before_merge = self.merged_adapters, self._before_merge
        return layer

    @property
    def wrappers(self) -> list["LoraParameter"]:
        """This one and those inside it, one for each adapted parameter of the module."""
        inner = self.base_layer.wrappers if isinstance(self.base_layer, LoraParameter) else []
        return [self, *inner]

    def _create(self, name: str, r: int, bias: bool, **placement: Any) -> None:
        skip, ranks = nn.utils.skip_init, r * self.num_experts
        self.lora_A[name] = skip(nn.Linear, self.in_features, ranks, bias=False, **placement)
        self.lora_B[name] = skip(nn.Linear, ranks, self.out_features, bias=False, **placement)

    def _initialize(self, name: str, config: LoraConfig, fresh: bool = True) -> None:
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        config.init.fill(A, B, self.base_weight.flatten(0, -2), self.scaling[name])  # type: ignore[arg-type]

    def _check(self, config: LoraConfig) -> None:
        if not config.init.kind.any_shape:
            raise InputError(
                f"init_lora_weights='{config.init_lora_weights}' is not defined for parameters"
            )

    def _delta(self, name: str) -> torch.Tensor:
        """`scaling * B A` in the shape of the parameter, as part of the graph."""
        A, B = by_matrix(*self.matrices(name), self.num_experts)
        delta = torch.bmm(B * self.scaling[name], A)  # (experts, d_out, d_in)
        return (delta.mT if self._stored_transposed else delta).view_as(self.base_weight)

    def _row_update_of(self, name: str) -> RowUpdate | None:
        if self.base_weight.dim() == 2:
            return super()._row_update_of(name)
        dtype = torch.promote_types(self.base_weight.dtype, self.matrices(name)[0].dtype)
        A, B = (factor.detach().to(dtype) for factor in self.matrices(name))
        A, B = by_matrix(A, B, self.num_experts)
        B = B * self.scaling[name]
        if self._stored_transposed:
            return lambda total, _, experts: total.baddbmm_(A[experts].mT, B[experts].mT)
        return lambda total, _, experts: total.baddbmm_(B[experts], A[experts])

    def update_energy(self, names: Sequence[str]) -> float | None:
        # In a stack each expert has a product of its own.
        return super().update_energy(names) if self.base_weight.dim() == 2 else None

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """`scaling * B A`, in the shape of the parameter; never part of a graph."""
        return self._delta(name).detach()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output with the adapted parameter in place of its own.

        Where rows have adapters of their own, the module runs once for every adapter among them:
        what it does with the parameter is its own affair, and cannot be stacked from outside.
        """
        route = self.routing.route
        if route.rows is None:
            return self._with(self._on_route() if not self.merged else [], args, kwargs)
        if self.merged:
            raise InputError(
                "adapter_names cannot be used while an adapter is merged: unmerge first"
            )
        own = {name for wrapper in self.wrappers for name in wrapper.r}
        names = list(dict.fromkeys(name for name in route.row_names if name in own))
        if not names:
            return self.base_layer(*args, **kwargs)
        return self._with_rows(names, route, args, kwargs)

    def _with(self, names: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        if not names:
            return self.base_layer(*args, **kwargs)
        W: torch.Tensor = self.base_weight
        for name in names:
            W = W + self._delta(name).to(W.dtype)
        inner, path = self.base_layer, self.parameter_name
        while inner is not self.get_base_layer():
            inner, path = inner.base_layer, f"base_layer.{path}"
        return functional_call(self.base_layer, {path: W}, args, kwargs)

    def _with_rows(
        self, names: list[str], route: Route, args: tuple, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        index = self._row_index(given, names, route)
        outputs = []
        for name in names:
            with self.routing.using(Route(shared=(name,))):  # those inside have the adapter too
                outputs.append(self._with(self._on_route(), args, kwargs))
        if not set(route.rows or ()) <= set(names):
            with self.routing.using(Route()):
                outputs.append(self._with([], args, kwargs))
        return torch.stack(outputs)[index, torch.arange(len(index), device=index.device)]

    def _row_index(
        self, given: Sequence[torch.Tensor], names: Sequence[str], route: Route
    ) -> torch.Tensor:
        """`Route.row_index` of the module's input.

        A stack that is given nothing but tokens has a batched product, for which every expert gets
        all of them, expert after expert (Llama 4).
        """
        x = given[0]
        tokens = math.prod(route.shape or (0,))
        if len(given) == 1 and self.num_experts > 1 and len(x) == self.num_experts * tokens:
            return route.row_index(x[:tokens], names).repeat(self.num_experts)
        return route.row_index(x, names)


def by_matrix(A: torch.Tensor, B: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of each of `count` stacked matrices: A (count, r, d_in), B (count, d_out, r).

    Shapes: A (count * r, d_in), B (d_out, r * count), as PEFT keeps them.
    """
    return (
        A.reshape(count, -1, A.shape[-1]),
        B.reshape(B.shape[0], -1, count).permute(2, 0, 1),
    )
