"""Watching an adapter learn: how strong its gradients are, and how far it has moved.

`LoraMonitor` works with any training loop, and is a callback for any `transformers.Trainer`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainerCallback

from lorakit.errors import InputError
from lorakit.lora.layers import LoraLayer
from lorakit.lora.model import LoraModel
from lorakit.lora.wrapping import wrapped_modules
from lorakit.weight_formats import dequantized

_TOGETHER = 2**22  # numbers of A and B that are measured at once


@dataclass(frozen=True)
class AdapterState:
    """One module's adapter, or all of them together; every value is a Frobenius norm or a ratio.

    Attributes:
        gradient_norm: of the gradients of `A` and `B` together; 0 where there are none.
        weight_change: how far `A` and `B` have moved since the start.
        update_norm: of what was added to `scaling * B A` since the start.
        weight_norm: of the frozen weight.
    """

    gradient_norm: float
    weight_change: float
    update_norm: float
    weight_norm: float

    @property
    def relative_update(self) -> float:
        """The update measured against the frozen weight, ‖ΔW‖ / ‖W‖."""
        return self.update_norm / self.weight_norm if self.weight_norm else math.inf

    @classmethod
    def together(cls, states: list[Self]) -> Self:
        """Several modules as one: the root of the sum of squares."""
        return cls(*(math.hypot(*(getattr(s, f.name) for s in states)) for f in fields(cls)))


class LoraMonitor(TrainerCallback):
    """Measures the active adapter of a model against how it was at the start.

    Alone: `monitor = LoraMonitor(model)`, then `monitor.measure()` between `backward()` and
    `zero_grad()`. With Trainer: `Trainer(..., callbacks=[LoraMonitor()])`; it then measures
    before every step that is logged, after clipping, and keeps `history`.

    Attributes:
        history: `(step, state by module path, state of all together)` of every measurement that
            was made as a callback.
    """

    def __init__(self, model: LoraModel | None = None) -> None:
        self.history: list[tuple[int, dict[str, AdapterState], AdapterState]] = []
        self._layers: dict[str, LoraLayer] = {}
        self._start: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._weight_norms: dict[str, float] = {}
        self._alike: list[list[str]] = []  # layers of one shape, which are measured together
        self._adapter = ""
        if model is not None:
            self.start(model)

    def start(self, model: nn.Module) -> None:
        """Takes the model's active adapter as it is now for the start.

        Raises:
            InputError: `model` has no active adapter.
        """
        if not isinstance(model, LoraModel) or not model.active_adapter:
            raise InputError("LoraMonitor watches a LoraModel with an active adapter")
        self._adapter = model.active_adapter
        self._layers = {
            name: module
            for name, module in wrapped_modules(model.get_base_model())
            if isinstance(module, LoraLayer) and self._adapter in module.r
        }
        by_shape: dict[tuple[Any, ...], list[str]] = {}
        for name, layer in self._layers.items():
            A, B = layer.matrices(self._adapter)
            self._start[name] = (A.detach().clone(), B.detach().clone())
            W = dequantized(layer.base_weight, layer.get_base_layer())
            self._weight_norms[name] = W.detach().float().norm().item()
            by_shape.setdefault((A.shape, B.shape, A.device), []).append(name)
        self._alike = [part for names in by_shape.values() for part in self._cut(names)]

    @torch.no_grad()
    def measure(self) -> dict[str, AdapterState]:
        """The state of every adapted module now, by its path in the base model."""
        measured = {n: state for names in self._alike for n, state in self._measure(names).items()}
        return {name: measured[name] for name in self._layers}

    def total(self, states: dict[str, AdapterState] | None = None) -> AdapterState:
        """All modules together; `states` is a measurement, None takes a new one."""
        return AdapterState.together(list((states or self.measure()).values()))

    def _cut(self, names: list[str]) -> list[list[str]]:
        """Groups of layers whose matrices, twice and in float64, stay within some 100 MB."""
        size = max(1, _TOGETHER // sum(tensor.numel() for tensor in self._start[names[0]]))
        return [names[at : at + size] for at in range(0, len(names), size)]

    def _measure(self, names: list[str]) -> dict[str, AdapterState]:
        """Layers of one shape in a few large operations and one wait for the device."""
        now = [self._layers[name].matrices(self._adapter) for name in names]
        A, B = (torch.stack([pair[i].float() for pair in now]) for i in (0, 1))
        A0, B0 = (torch.stack([self._start[n][i].float() for n in names]) for i in (0, 1))
        moved = torch.hypot((A - A0).norm(dim=(1, 2)), (B - B0).norm(dim=(1, 2)))
        scaling = [self._layers[name].scaling[self._adapter] for name in names]
        update = _product_change(A, B, A0, B0).to(moved) * torch.tensor(scaling).to(moved)
        columns = torch.stack([self._gradient_norms(names).to(A.device), moved, update])
        return {
            name: AdapterState(gradient, change, norm, self._weight_norms[name])
            for name, (gradient, change, norm) in zip(names, columns.T.tolist(), strict=True)
        }

    def _gradient_norms(self, names: list[str]) -> torch.Tensor:
        zero = torch.zeros((), device=self._start[names[0]][0].device)
        norms = []
        for name in names:
            trained = self._layers[name].adapter_tensors(self._adapter).values()
            squares = [p.grad.float().square().sum() for p in trained if p.grad is not None]
            norms.append(torch.stack(squares).sum().sqrt() if squares else zero)
        return torch.stack(norms)

    # --- as a callback of Trainer -----------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Starts, unless a model was given before."""
        if not self._layers:
            self.start(getattr(model, "module", model))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures while the gradients are there, on the steps that Trainer logs."""
        step = state.global_step + 1
        if step % max(1, state.logging_steps) == 0:
            states = self.measure()
            self.history.append((step, states, self.total(states)))


def _product_change(
    A: torch.Tensor, B: torch.Tensor, A0: torch.Tensor, B0: torch.Tensor
) -> torch.Tensor:
    """‖B A - B0 A0‖ (n,) of n pairs, A (n, r, d_in), without forming (d_out, d_in) matrices.

    With L = [B, -B0] and R = [A; A0] the norm's square is the sum of (L^T L) * (R R^T).
    """
    if B0.any():
        # Two products that are almost the same: their difference needs float64.
        if B.device.type == "mps":  # has no float64
            A, B, A0, B0 = (tensor.cpu() for tensor in (A, B, A0, B0))
        L, R = torch.cat([B, -B0], dim=2).double(), torch.cat([A, A0], dim=1).double()
    else:
        L, R = B, A
    return ((L.mT @ L) * (R @ R.mT)).sum((1, 2)).clamp(min=0).sqrt()
