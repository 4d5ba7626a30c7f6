"""A frozen layer with a bank of named adapters beside it.

A wrapped layer keeps PEFT's structure: `base_layer` is the frozen original, `lora_A[name].weight`
(r, in) and `lora_B[name].weight` (out, r) are the adapter `name`. The `Routing` that all layers
of a model share says which of them serve which rows. Finding the layers is `targets.py`'s work,
putting them into a model `injection.py`'s.
"""

import math
from abc import abstractmethod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.config import LoraConfig
from lorakit.lora.dora import Magnitude, channel_norms
from lorakit.lora.initialize import initialize, initialize_bias
from lorakit.lora.layers.mergeable import Mergeable
from lorakit.lora.routing import Route, Routing


class LoraLayer(Mergeable):
    """One frozen layer and its adapters: a bank that adapters join, leave, merge into."""

    def __init__(self, base_layer: nn.Module, routing: Routing | None = None) -> None:
        super().__init__(base_layer, routing)
        self.lora_dropout = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.lora_initial = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._own_scaling: dict[str, float] = {}
        if (bias := self.base_bias) is not None:
            bias.requires_grad_(False)

    @property
    def base_bias(self) -> nn.Parameter | None:
        """The base layer's bias, None where it has none."""
        return getattr(self.get_base_layer(), self.bias_name, None)

    @classmethod
    def from_base(cls, base_layer: nn.Module, routing: Routing) -> Self:
        """An empty bank around `base_layer`, on a model's shared routing."""
        return cls(base_layer, routing=routing)

    # --- the bank -------------------------------------------------------------------------

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
        r, alpha = config.rank_for(module_name), config.alpha_for(module_name)
        base = self.base_weight
        half = base.dtype in (torch.float16, torch.bfloat16) and autocast
        dtype = torch.float32 if half or not base.dtype.is_floating_point else base.dtype
        self.r[name] = r
        self.rescale(name, r, alpha, config.use_rslora)
        p = config.lora_dropout
        dropout = nn.Dropout(p) if p > 0 else nn.Identity()
        self.lora_dropout[name] = dropout.train(self.training)
        self._create(name, r, config.lora_bias, device=base.device, dtype=dtype)
        if initialize or config.starts_from_weight:
            self._initialize(name, config)
        if (bias := self._factor_tensors(name).get("lora_B.bias")) is not None and initialize:
            initialize_bias(bias, config.init_lora_weights)
        if config.use_dora:
            norms = (
                self._norms(name)
                if initialize
                else torch.empty(self.out_features, device=base.device)
            )
            self.lora_magnitude_vector[name] = Magnitude(self._stored_lengths(norms.to(dtype)))

    @property
    def adapters(self) -> list[str]:
        """The names of the adapters that this layer has."""
        return list(self.r)

    def _forget(self, name: str) -> None:
        for part in (self.r, self.lora_alpha, self.scaling, self._own_scaling):
            part.pop(name, None)
        for bank in self._banks():
            if name in bank:
                del bank[name]

    def rescale(self, name: str, r: int, alpha: float, use_rslora: bool) -> None:
        """Gives adapter `name` the scaling of a rank and an alpha: `alpha / r`, or by √r."""
        self.lora_alpha[name] = alpha
        self.scaling[name] = alpha / math.sqrt(r) if use_rslora else alpha / r
        self._own_scaling[name] = self.scaling[name]

    def set_scale(self, name: str, scale: float) -> None:
        """Multiplies adapter `name`'s own scaling by `scale`: 0 is off, 1 as it was trained."""
        if name in self.r:
            self.scaling[name] = scale * self._own_scaling[name]

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The parameters of adapter `name` under the ends of PEFT's keys (`lora_A.weight`, …)."""
        if name not in self.r:
            return {}
        tensors = self._factor_tensors(name)
        if (magnitude := self._magnitude(name)) is not None:
            tensors["lora_magnitude_vector"] = magnitude
        return tensors

    def _check(self, config: LoraConfig) -> None:
        """Raises InputError when `config` asks for what this kind of layer does not do."""

    @abstractmethod
    def _create(self, name: str, r: int, bias: bool, **placement: Any) -> None:
        """Creates the parameters of adapter `name`, of rank `r`, uninitialised."""

    def _initialize(self, name: str, config: LoraConfig) -> None:
        """Fills the parameters of adapter `name` as `LoraConfig.init_lora_weights` says."""
        A, B = self.matrices(name)
        initial = initialize(A, B, self._as_matrix(self.base_weight), self.scaling[name], config)
        if initial is not None:
            self.lora_initial[name] = initial

    def _factor_tensors(self, name: str) -> dict[str, torch.Tensor]:
        A, B = self.lora_A[name], self.lora_B[name]
        tensors = {"lora_A.weight": A.weight, "lora_B.weight": B.weight}
        return tensors if B.bias is None else {**tensors, "lora_B.bias": B.bias}

    def _banks(self) -> tuple[nn.ModuleDict | nn.ParameterDict, ...]:
        """The dictionaries by adapter name that hold modules and parameters."""
        common = self.lora_dropout, self.lora_magnitude_vector, self.lora_initial
        return *common, self.lora_A, self.lora_B

    def _magnitude(self, name: str) -> nn.Parameter | None:
        if name not in self.lora_magnitude_vector:
            return None
        return self.lora_magnitude_vector.get_submodule(name).weight  # type: ignore[return-value]

    # --- an adapter as matrices -----------------------------------------------------------

    def matrices(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`A` (r, d_in) and `B` (d_out, r) of adapter `name`, views of its parameters."""
        return self.lora_A[name].weight, self.lora_B[name].weight

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

        Computed in the adapter's dtype; never part of a graph. DoRA's lengths are not in it.
        """
        A, B = (factor.detach() for factor in self.factors(name))
        return self._as_stored((B @ A).mul_(self.scaling[name]))

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored base weight as (d_out, d_in)."""
        return weight

    def _as_stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """The inverse of `_as_matrix`."""
        return matrix

    def _norms(self, name: str) -> torch.Tensor:
        """DoRA's norms (d_out,), from the weight as it is without anything merged."""
        W = self._as_matrix(self._unmerged(self.weight_name)).detach()
        return channel_norms(W, *self.factors(name), self.scaling[name])

    def _stored_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """DoRA's lengths (d_out,) in the shape in which PEFT stores them."""
        return lengths

    def _lengthening(self, name: str) -> torch.Tensor:
        """DoRA's factor for every output channel (d_out,): the trained length by the norm."""
        magnitude = self._magnitude(name)
        assert magnitude is not None
        return magnitude.flatten() / self._norms(name)

    # --- merging --------------------------------------------------------------------------

    def _merged(self, names: list[str]) -> dict[str, torch.Tensor]:
        W = self._unmerged(self.weight_name)
        dtype = torch.promote_types(W.dtype, self.factors(names[0])[0].dtype)
        total = W.to(dtype)
        for name in names:
            total = total + self._weight_update(name).to(dtype)
        merged = {self.weight_name: total}
        biases = [b for name in names if (b := self.bias_update(name)) is not None]
        if biases:
            if self.base_bias is None:
                raise InputError("an adapter with lora_bias cannot be merged: the base has no bias")
            merged[self.bias_name] = self._unmerged(self.bias_name) + sum(biases)
        return merged

    def _weight_update(self, name: str) -> torch.Tensor:
        """All that adapter `name` changes in the stored weight, DoRA's lengths included."""
        with_lengths = self.dora_update(name)
        return (
            self.get_delta_weight(name) if with_lengths is None else self._as_stored(with_lengths)
        )

    @torch.no_grad()
    def dora_update(self, name: str) -> torch.Tensor | None:
        """`m (W + scaling B A) / ‖…‖ - W` (d_out, d_in), None for an adapter without lengths."""
        if self._magnitude(name) is None:
            return None
        A, B = self.factors(name)
        W = self._as_matrix(self._unmerged(self.weight_name)).to(A.dtype)
        return self._lengthening(name)[:, None] * (W + self.scaling[name] * B @ A) - W

    def bias_update(self, name: str) -> torch.Tensor | None:
        """`scaling` times the bias of `B` (d_out,), None without one."""
        bias = self.lora_B[name].bias
        return None if bias is None else bias * self.scaling[name]

    # --- computing ------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus the update of the adapters on the route."""
        route = self.routing.route
        if route.rows is None:
            names = [] if self.merged else self.active_adapters
            return self._forward_shared(x, names, *args, **kwargs)
        if self.merged:
            raise RuntimeError("rows cannot choose adapters while one is merged: unmerge first")
        y = self.base_layer(x, *args, **kwargs)
        names = self._on_route()
        return y + self._row_update(x, y, names, route).to(y.dtype) if names else y

    def _on_route(self) -> list[str]:
        """The adapters of this layer that the route in force gives to any row."""
        route = self.routing.route
        if route.rows is None:
            return self.active_adapters
        return [name for name in route.row_names if name in self.r]

    def _forward_shared(
        self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The output when `names` serve every row; an empty list is the base alone."""
        y = total = self.base_layer(x, *args, **kwargs)
        for name in names:
            total = total + self._update(x, y, name).to(y.dtype)
        return total

    def _update(self, x: torch.Tensor, y: torch.Tensor, name: str) -> torch.Tensor:
        """What adapter `name` adds to the base's output `y` of `x`."""
        dropped = self._dropped(x, name)
        update = self._low_rank(dropped, name)
        if (bias := self.bias_update(name)) is not None:
            update = update + self._per_channel(bias).to(y.dtype)
        if self._magnitude(name) is None:
            return update
        factor = self._per_channel(self._lengthening(name)).to(y.dtype)
        return (factor - 1) * self._base_product(x, y, dropped) + factor * update

    def _row_update(
        self, x: torch.Tensor, y: torch.Tensor, names: list[str], route: Route
    ) -> torch.Tensor:
        """What is added to `y` when every row has the adapter, of `names`, that `route` says."""
        index = route.row_index(x.shape[0], names, x.device)
        dropped = self._row_dropped(x, names, index)
        A, B = (factor.to(y.dtype)[index] for factor in self._stacked(names))
        update = self._row_low_rank(dropped, A, B)
        biases = [self.bias_update(name) for name in names]
        if any(bias is not None for bias in biases):
            rows = torch.stack(
                [y.new_zeros(B.shape[1]) if b is None else b for b in (*biases, None)]
            )
            update = update + self._per_channel(rows[index], y).to(y.dtype)
        dora = [self._magnitude(name) is not None for name in names]
        if not any(dora):
            return update
        one = torch.ones(B.shape[1], device=y.device)
        factors = [self._lengthening(n) if own else one for n, own in zip(names, dora, strict=True)]
        factor = self._per_channel(torch.stack([*factors, one])[index], y).to(y.dtype)
        return (factor - 1) * self._base_product(x, y, dropped) + factor * update

    @abstractmethod
    def _low_rank(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """`scaling * B A x` of adapter `name`, in the shape of the base's output."""

    @abstractmethod
    def _row_low_rank(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """`B A x` where row i has the factors A[i] (r, d_in) and B[i] (d_out, r)."""

    @abstractmethod
    def _base_product(
        self, x: torch.Tensor, y: torch.Tensor, dropped: torch.Tensor
    ) -> torch.Tensor:
        """`W x` without the bias, of the input as the adapter sees it; `y` is the base's output."""

    def _per_channel(self, values: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """`values` (d_out,), or (batch, d_out) with `y`, so that they broadcast over outputs."""
        if values.dim() == 1 or y is None:
            return values
        return values.view(values.shape[0], *[1] * (y.dim() - 2), values.shape[1])

    def _dropped(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.lora_dropout[name](x)

    def _row_dropped(self, x: torch.Tensor, names: list[str], index: torch.Tensor) -> torch.Tensor:
        """Drops from every row of `x` (batch, …) at the rate of its own adapter."""
        rates = [getattr(self.lora_dropout[name], "p", 0.0) for name in names]
        if not self.training or not any(rates):
            return x
        keep = 1 - torch.tensor([*rates, 0.0], device=x.device, dtype=x.dtype)[index]
        keep = keep.view(-1, *[1] * (x.dim() - 1))
        return x * torch.bernoulli(keep.expand_as(x)) / keep

    def _stacked(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of `names` in one tensor each, and one more of zeros for "no adapter".

        Ranks are padded with zeros up to the largest, which leaves every product as it is; the
        scaling is folded into `B`.

        Returns: A (n + 1, r, d_in) and B (n + 1, d_out, r).
        """
        factors = [self.factors(name) for name in names]
        r = max(A.shape[0] for A, _ in factors)
        As, Bs = [], []
        for name, (A, B) in zip(names, factors, strict=True):
            As.append(F.pad(A, (0, 0, 0, r - A.shape[0])))
            Bs.append(F.pad(B * self.scaling[name], (0, r - B.shape[1])))
        As.append(torch.zeros_like(As[0]))
        Bs.append(torch.zeros_like(Bs[0]))
        return torch.stack(As), torch.stack(Bs)
