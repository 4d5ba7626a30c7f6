"""What a frozen layer with adapters computes: its own output, and the updates of the route.

The `Routing` that all layers of a model share says which adapters serve which rows. Finding the
layers is `targets.py`'s work, putting them into a model `injection.py`'s.
"""

from abc import abstractmethod
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from lorakit.errors import InputError
from lorakit.lora.layers.bank import LayerBank
from lorakit.lora.routing import Route


class LoraLayer(LayerBank):
    """One frozen layer and its adapters, those on the route added to its output."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output plus the update of the adapters on the route."""
        route = self.routing.route
        if route.rows is None:
            names = [] if self.merged else self.active_adapters
            return self._forward_shared(x, names, *args, **kwargs)
        if self.merged:
            raise InputError("rows cannot choose adapters while one is merged: unmerge first")
        if route.sizes is not None:
            return self._forward_parts(x, route, *args, **kwargs)
        y = self.base_output(x, *args, **kwargs)
        names = self._on_route()
        return y + self._row_update(x, y, names, route).to(y.dtype) if names else y

    def _on_route(self) -> list[str]:
        """The adapters of this layer that the route in force gives to any row."""
        route = self.routing.route
        if route.rows is None:
            return self.active_adapters
        return [name for name in route.row_names if name in self.r]

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
        """The output when neighbouring positions have one adapter, as `route.sizes` says."""
        y = self.base_output(x, *args, **kwargs)
        dim, sizes = route.parts(x)
        total = []
        for part, output, name, width, stream in zip(
            x.split(sizes, dim),
            y.split(sizes, dim),
            route.rows or (),
            route.own_widths(x),
            route.drawn_from(),
            strict=True,
        ):
            if name not in self.r:
                total.append(output)
                continue
            own, seen, filling = output, part, None
            if width is not None:
                own, seen, filling = output[:, :width], part[:, :width], output[:, width:]
            draws = stream is not None and getattr(self.lora_dropout[name], "p", 0.0) > 0
            with stream.drawing(x.device) if stream and draws else nullcontext():
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

    def _row_update(
        self, x: torch.Tensor, y: torch.Tensor, names: list[str], route: Route
    ) -> torch.Tensor:
        """What is added to `y` when every row has the adapter, of `names`, that `route` says."""
        index = route.row_index(x, names)
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
        factors = [
            self._magnitude_factor(n) if own else one for n, own in zip(names, dora, strict=True)
        ]
        factor = self._per_channel(torch.stack([*factors, one])[index], y).to(y.dtype)
        update = (factor - 1) * self._base_product(x, y, dropped) + factor * update
        if not self.shares:
            return update
        shares = torch.tensor([*(self.shares.get(name, 1.0) for name in names), 1.0]).to(y)
        return update * shares[index].view(-1, *[1] * (y.dim() - 1))

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
