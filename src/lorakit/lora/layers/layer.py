"""Low-rank adapters beside one frozen layer: their parameters, what they compute, their merge.

PEFT's structure: `base_layer` is the frozen original, `lora_A[name].weight` (r, d_in) and
`lora_B[name].weight` (d_out, r) are the adapter `name`. The `Routing` that all layers of a model
share says which adapters serve which rows. A kind of layer has a file of its own (`linear.py`,
`conv.py`, …) with what differs; finding layers is `targets.py`'s work, wrapping `wrapping.py`'s.
"""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Self

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.init import PREPARED, InitialFactors
from lorakit.lora.layers.weight_updates import (
    RowUpdate,
    channel_norms,
    dora_rows,
    merged_rows,
    product_rows,
    row_blocks,
    transposed_rows,
)
from lorakit.lora.layers.wrapped import WrappedModule
from lorakit.lora.routing import Route, Routing


class Magnitude(nn.Module):
    """DoRA's trained magnitudes `m`, (d_out,) or what broadcasts to a layer's output."""

    def __init__(self, magnitude: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(magnitude.detach().clone())


class LoraLayer(WrappedModule):
    """One frozen layer and its adapters, those on the route added to its output.

    A kind of layer defines `_create`, `_low_rank` and `_base_product`, and `_as_matrix` with
    `_as_stored` where its weight is not stored as (d_out, d_in).
    """

    by_name: tuple[str, ...] = (
        *("r", "lora_alpha", "scaling", "_own_scaling", "lora_A", "lora_B"),
        *("lora_dropout", "lora_magnitude_vector", "lora_initial"),
    )

    nesting = 4

    bias_name = "bias"
    """The name of the base layer's bias, if it has one."""

    stored_transposed = False
    """Whether the base stores its weight as (d_in, d_out)."""

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None) -> None:
        super().__init__(base_layer, routing)
        # In this order, which is the parameters' in an optimiser's saved state.
        self.lora_dropout = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.lora_initial = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._own_scaling: dict[str, float] = {}
        self._kept_factors: dict[str, torch.Tensor] = {}  # DoRA's, where adapters stay as they are
        self._whole_weights: dict[str, nn.Parameter] = {}  # those that LoftQ replaced
        self.base_weight.requires_grad_(False)
        if (bias := self.base_bias) is not None:
            bias.requires_grad_(False)

    @property
    def base_bias(self) -> nn.Parameter | None:
        """The base layer's bias, None where it has none."""
        return getattr(self.get_base_layer(), self.bias_name, None)

    @classmethod
    def from_base(cls, base_layer: nn.Module, routing: Routing) -> Self:
        """A layer without adapters around `base_layer`, on a model's shared routing."""
        return cls(base_layer, routing=routing)

    def _get_name(self) -> str:
        """`lora.Linear`: how a printed model shows this layer, as in PEFT."""
        return f"lora.{type(self).__name__.removeprefix('Lora')}"

    # --- which adapters there are ---------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        config: LoraConfig,
        module_name: str = "",
        autocast: bool = True,
        initialize: bool = True,
    ) -> None:
        """Makes room for adapter `name` and initialises it; the base and the others stay.

        Args:
            module_name: this layer's path in the model, for `rank_pattern` and `alpha_pattern`.
            autocast: weights are float32 where the base is float16, bfloat16 or quantised, so
                that small steps are not rounded away; otherwise they have the base's dtype.
            initialize: False leaves the values to be loaded.
        """
        self._check(config)
        r = config.rank_for(module_name)
        base = self.base_weight
        half = base.dtype in (torch.float16, torch.bfloat16) and autocast
        dtype = torch.float32 if half or not base.dtype.is_floating_point else base.dtype
        self.r[name] = r
        self.rescale(name, config.alpha_for(module_name), config.scaling_for(module_name))
        p = config.lora_dropout
        dropout = nn.Dropout(p) if p > 0 else nn.Identity()
        self.lora_dropout[name] = dropout.train(self.training)
        if config.lora_bias and self.base_bias is None:
            message = f"`lora_bias=True` beside a layer without bias ({module_name}): no merging"
            warnings.warn(message, stacklevel=7)
        self._create(name, r, config.lora_bias, device=base.device, dtype=dtype)
        init = config.init.kind
        if initialize or init.changes_base or init.subtracted:
            self._initialize(name, config, fresh=initialize or init.changes_base)
        if (bias := self._factor_tensors(name).get("lora_B.bias")) is not None and initialize:
            init.bias(bias)
        if config.use_dora:
            norms = (
                self._norms(name)
                if initialize
                else torch.empty(self.out_features, device=base.device)
            )
            self.lora_magnitude_vector[name] = Magnitude(self._stored_magnitude(norms.to(dtype)))

    def delete_adapter(self, name: str) -> None:
        """Forgets adapter `name`, if this layer has it."""
        super().delete_adapter(name)
        self._restore_weight([name])
        self._kept_factors.pop(name, None)

    def original(self, active: Iterable[str] = ()) -> nn.Module:
        """The base layer, with its own weight, or with what was merged into it."""
        if not self.merged:
            self._restore_weight(self.adapters)
        return super().original(active)

    def _check(self, config: LoraConfig) -> None:
        """Raises InputError when `config` asks for what this kind of layer does not do."""

    def _create(self, name: str, r: int, bias: bool, **placement: Any) -> None:
        """Creates the parameters of adapter `name`, of rank `r`, uninitialised."""
        raise NotImplementedError

    def _initialize(self, name: str, config: LoraConfig, fresh: bool = True) -> None:
        """Fills the parameters of adapter `name` as `LoraConfig.init_lora_weights` says.

        Args:
            fresh: False when values are loaded next, and only need a place.
        """
        A, B = self.initial_places(name)
        if fresh or (config.init.kind.repeatable and not self.base_weight.is_meta):
            prepared = vars(self.get_base_layer()).pop(PREPARED, None)
            W = self._as_matrix(self.base_weight)
            initial, weight = config.init.fill(A, B, W, self.scaling[name], prepared)
        else:
            initial, weight = InitialFactors(torch.zeros_like(A), torch.zeros_like(B)), None
        if initial is not None:
            self.lora_initial[name] = initial
        if weight is not None:
            self._replace_weight(name, weight)

    def initial_places(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The tensors that initialisation fills."""
        return self.matrices(name)

    def _replace_weight(self, name: str, matrix: torch.Tensor) -> None:
        """Puts a weight that an initialisation made in the base's place, until `name` goes."""
        whole = self._whole_weights[name] = self.base_weight
        weight = self._as_stored(matrix).to(whole.dtype).contiguous()
        setattr(self.get_base_layer(), self.weight_name, nn.Parameter(weight, requires_grad=False))

    def _restore_weight(self, names: Iterable[str]) -> None:
        for name in names:
            if (whole := self._whole_weights.pop(name, None)) is not None:
                setattr(self.get_base_layer(), self.weight_name, whole)

    # --- how strong they are --------------------------------------------------------------

    def rescale(self, name: str, alpha: float, scaling: float) -> None:
        """Gives adapter `name` an alpha, and the scaling that comes of it."""
        self.lora_alpha[name] = alpha
        self.scaling[name] = self._own_scaling[name] = scaling
        self.values_changed(name)

    def values_changed(self, name: str) -> None:
        """Forgets what was computed of adapter `name` before its scaling changed."""
        self._kept_factors.pop(name, None)

    def own_scaling(self, name: str) -> float:
        """The scaling of adapter `name` without what `set_scale` has made of it."""
        return self._own_scaling[name]

    def set_scale(self, name: str, scale: float) -> None:
        """Multiplies adapter `name`'s own scaling by `scale`: 0 is off, 1 as it was trained."""
        if name in self.r:
            self.scaling[name] = scale * self._own_scaling[name]
            self.values_changed(name)

    def set_share(self, name: str, share: float) -> None:
        if name in self.lora_magnitude_vector:  # its update is no multiple of its scaling
            super().set_share(name, share)
        else:
            self.set_scale(name, share)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scaling of the active adapters by `scale`, on top of what it is."""
        for name in self.active_adapters:
            self.scaling[name] *= scale
            self.values_changed(name)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scaling of the active adapters by `scale`; None makes it their own again."""
        for name in self.active_adapters:
            self.scaling[name] = self.scaling[name] / scale if scale else self._own_scaling[name]
            self.values_changed(name)

    # --- what the layer computes ----------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus the update of the adapters on the route."""
        route = self.routing.route
        if route.rows is None:
            names = [] if self.merged_adapters else [n for n in route.shared if n in self.r]
            return self._forward_shared(x, names, *args, **kwargs)
        if self.merged_adapters:
            raise InputError(
                "adapter_names cannot be used while an adapter is merged: unmerge first"
            )
        if self.r.keys().isdisjoint(route.row_names):
            return self.base_output(x, *args, **kwargs)
        if route.grouped is None:
            return self._forward_parts(x, route, *args, **kwargs)
        order, inverse = route.order(x)
        return self._forward_parts(x[order], route.grouped[0], *args, **kwargs)[inverse]

    def _on_route(self) -> list[str]:
        """The adapters of this layer that the route in force gives to any row."""
        route = self.routing.route
        names = route.shared if route.rows is None else route.row_names
        return [name for name in names if name in self.r]

    def base_output(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The frozen layer's own output."""
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return y

    def _forward_shared(
        self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The output when `names` serve every row; an empty list is the base alone."""
        y = total = self.base_output(x, *args, **kwargs)
        for name in names:
            total = total + self._update(x, y, name).to(y.dtype)
        return total

    def _forward_parts(
        self, x: torch.Tensor, route: Route, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The output when each part of the route has an adapter of its own, or none."""
        y = self.base_output(x, *args, **kwargs)
        dim, parts = route.parts(x)
        sizes = [part.size for part in parts]
        total = []
        for seen, output, part in zip(x.split(sizes, dim), y.split(sizes, dim), parts, strict=True):
            if (name := part.adapter) not in self.r:
                total.append(output)
                continue
            own, filling = output, None
            if (width := part.width) is not None:
                own, seen, filling = output[:, :width], seen[:, :width], output[:, width:]
            draws = part.stream is not None and getattr(self.lora_dropout[name], "p", 0.0) > 0
            with part.stream.drawing(x.device) if part.stream and draws else nullcontext():
                own = own + self._update(seen, own, name).to(y.dtype)
            total.append(own if filling is None else torch.cat([own, filling], 1))
        return torch.cat(total, dim)

    def _update(self, x: torch.Tensor, y: torch.Tensor, name: str) -> torch.Tensor:
        """What adapter `name` adds to the base's output `y` of `x`."""
        dropped = self._dropped(x, name)
        update = self._low_rank(dropped, name)
        if (bias := self.bias_update(name)) is not None:
            update = update + self._per_channel(bias).to(y.dtype)
        if self._magnitude(name) is None:
            return update
        factor = self._per_channel(self._magnitude_factor(name)).to(y.dtype)
        update = (factor - 1) * self._base_product(x, y, dropped) + factor * update
        return update * self.shares[name] if name in self.shares else update

    def _low_rank(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """`scaling * B A x` of adapter `name`, in the shape of the base's output."""
        raise NotImplementedError

    def _base_product(
        self, x: torch.Tensor, y: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        """`W x` without the bias, of the input as the adapter sees it; `y` is the base's output."""
        raise NotImplementedError

    def _dropped(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.lora_dropout[name](x)

    def _per_channel(self, values: torch.Tensor) -> torch.Tensor:
        """`values` (d_out,) so that they broadcast over outputs."""
        return values

    def _magnitude_factor(self, name: str) -> torch.Tensor:
        """DoRA's factor for every output channel (d_out,): the trained magnitude by the norm."""
        keeps = self.routing.frozen and not torch.is_grad_enabled()
        if keeps and name in self._kept_factors:
            return self._kept_factors[name]
        magnitude = self._magnitude(name)
        assert magnitude is not None
        factor = magnitude.flatten() / self._norms(name)
        if keeps:
            self._kept_factors[name] = factor
        return factor

    def _norms(self, name: str) -> torch.Tensor:
        """DoRA's norms (d_out,), from the weight as it is without anything merged."""
        W = self._as_matrix(self._unmerged(self.weight_name)).detach()
        return channel_norms(W, *self.factors(name), self.scaling[name])

    # --- an adapter as tensors ------------------------------------------------------------

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The parameters of adapter `name` under the ends of PEFT's keys (`lora_A.weight`, …)."""
        if name not in self.r:
            return {}
        tensors = self._factor_tensors(name)
        if (magnitude := self._magnitude(name)) is not None:
            tensors["lora_magnitude_vector"] = magnitude
        return tensors

    def _factor_tensors(self, name: str) -> dict[str, torch.Tensor]:
        A: Any = self.lora_A[name]
        B: Any = self.lora_B[name]
        tensors = {"lora_A.weight": A.weight, "lora_B.weight": B.weight}
        return tensors if B.bias is None else {**tensors, "lora_B.bias": B.bias}

    def _magnitude(self, name: str) -> nn.Parameter | None:
        if name not in self.lora_magnitude_vector:
            return None
        return self.lora_magnitude_vector.get_submodule(name).weight  # type: ignore[return-value]

    def _stored_magnitude(self, magnitude: torch.Tensor) -> torch.Tensor:
        """DoRA's magnitudes (d_out,) in the shape in which PEFT stores them."""
        return magnitude

    def matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` (r, d_in) and `B` (d_out, r) of adapter `name`, views of its parameters."""
        return self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[return-value]

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` (n, d_in) and `B` (d_out, n) whose product, times the scaling, is the update.

        n is the rank, or twice that where the initial factors are taken off again (PiSSA).
        """
        A, B = self.matrices(name)
        if name not in self.lora_initial:
            return A, B
        initial: Any = self.lora_initial[name]
        return torch.cat([A, initial.A]), torch.cat([B, -initial.B], dim=1)

    def get_delta_weight(self, name: str) -> torch.Tensor:
        """`scaling * B A` of adapter `name`, in the shape in which the base stores its weight.

        Computed in the adapter's dtype; never part of a graph. DoRA's magnitudes are not in it.
        """
        A, B = (factor.detach() for factor in self.factors(name))
        return self._as_stored((B @ A).mul_(self.scaling[name]))

    @torch.no_grad()
    def dora_update(self, name: str) -> torch.Tensor | None:
        """`m (W + scaling B A) / ‖…‖ - W` (d_out, d_in), None for an adapter without magnitudes."""
        if self._magnitude(name) is None:
            return None
        A, B = self.factors(name)
        W = self._as_matrix(self._unmerged(self.weight_name)).to(A.dtype)
        update = self._magnitude_factor(name)[:, None] * (W + self.scaling[name] * B @ A) - W
        return update.mul_(self.shares.get(name, 1.0))

    def bias_update(self, name: str) -> torch.Tensor | None:
        """`scaling` times the bias of `B` (d_out,), None without one."""
        bias: Any = self.lora_B[name].bias
        return None if bias is None else bias * self.scaling[name]

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored base weight as (d_out, d_in)."""
        return weight

    def _as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `_as_matrix`."""
        return matrix

    # --- merging: what `WrappedModule.merge` asks for -------------------------------------

    def changed_parameters(self, names: Sequence[str]) -> list[str]:
        if all(self.bias_update(name) is None for name in names):
            return [self.weight_name]
        if self.base_bias is None:
            raise InputError("an adapter with lora_bias cannot be merged: the base has no bias")
        return [self.weight_name, self.bias_name]

    @torch.no_grad()
    def merged_parameter(self, parameter: str, names: Sequence[str]) -> torch.Tensor:
        before = self._unmerged(parameter).detach()
        if parameter == self.bias_name:
            biases = [b for name in names if (b := self.bias_update(name)) is not None]
            return before + sum(biases)
        dtype = torch.promote_types(before.dtype, self.factors(names[0])[0].dtype)
        updates = self.row_updates(parameter, names)
        if updates is None:
            W = before.to(dtype)
            return W + sum(self._weight_update(name).to(dtype) for name in names)
        total = torch.empty(before.shape, dtype=dtype, device=before.device)
        for rows in row_blocks(before.shape):
            total[rows] = merged_rows(before[rows], rows, updates, dtype)
        return total

    @torch.no_grad()
    def row_updates(self, parameter: str, names: Sequence[str]) -> list[RowUpdate] | None:
        if parameter != self.weight_name:
            return None
        updates = [self._row_update_of(name) for name in names]
        return None if None in updates else updates  # type: ignore[return-value]

    def update_energy(self, names: Sequence[str]) -> float | None:
        if any(self._magnitude(name) is not None for name in names):
            return None
        factors = [(*self.factors(name), self.scaling[name]) for name in names]
        A = torch.cat([A.detach().double() for A, _, _ in factors])
        B = torch.cat([B.detach().double() * scaling for _, B, scaling in factors], dim=1)
        # ‖B A‖² = tr(Aᵀ Bᵀ B A), the sum over the products of two matrices of r × r.
        return max(0.0, ((B.T @ B) * (A @ A.T)).sum().item())

    def _row_update_of(self, name: str) -> RowUpdate | None:
        """What adapter `name` adds to rows of the stored weight."""
        A, B = (factor.detach() for factor in self.factors(name))
        dtype = torch.promote_types(self.base_weight.dtype, A.dtype)  # that of the sum
        A, B = A.to(dtype), B.to(dtype)
        scaling, magnitude = self.scaling[name], self._magnitude(name)
        if self.stored_transposed:
            return None if magnitude is not None else transposed_rows(A, B, scaling)
        if magnitude is None:
            return product_rows(A, B, scaling)
        m, share = magnitude.detach().flatten(), self.shares.get(name, 1.0)
        return dora_rows(A, B, scaling, m, share, self._as_matrix)

    def _weight_update(self, name: str) -> torch.Tensor:
        """All that adapter `name` changes in the stored weight, DoRA's magnitudes included."""
        update = self.dora_update(name)
        return self.get_delta_weight(name) if update is None else self._as_stored(update)
