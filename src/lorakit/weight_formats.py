"""The forms in which quantised weights are stored, and how each is unpacked.

The layers of `lora/` compute beside any weight whose format is registered here. The formats
themselves are the backends of `models/quantization/`, one file each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


class WeightFormat:
    """One form of quantised weights. A subclass must say `recognises` and `dequantize`.

    Attributes:
        name: what messages call it.
        rounds_input: the layer's own product may round its input too, not only the weight.
        fast_without_gradients: a GPU multiplies by the packed weight faster than it unpacks it.
    """

    name = ""
    rounds_input = False
    fast_without_gradients = False

    def recognises(self, weight: object) -> bool:
        """Whether `weight` is stored in this form."""
        raise NotImplementedError

    def covers(self, layer: nn.Module) -> bool:
        """Whether `layer` is a linear layer with such a weight, which LoRA can stand beside."""
        return self.recognises(getattr(layer, "weight", None))

    def dequantize(self, weight: Any, layer: Any, dtype: torch.dtype | None) -> torch.Tensor:
        """The numbers (d_out, d_in) that `weight` stands for.

        Args:
            layer: the one that has the weight; None where it is not known.
            dtype: to round them to, once; None for the one that the format unpacks to.
        """
        raise NotImplementedError

    def numel(self, weight: Any) -> int:
        """How many numbers `weight` stands for."""
        return weight.numel()

    def quantize(self, W: torch.Tensor, like: Any) -> nn.Parameter | None:
        """`W` (d_out, d_in) stored as `like` is; None if merging leaves the weight unpacked."""
        return None

    def restored(self, weight: Any) -> None:
        """Called when `weight` is a layer's again, after another one took its place."""

    def keep_exact(self, layer: Any) -> None:
        """Stops `layer` from rounding its stored weight again when it is evaluated."""

    def require_gradients(self, weight: Any) -> None:
        """Raises InputError if no gradients can go through `weight` to the layer's input."""


FORMATS: list[WeightFormat] = []
"""Those that are known, the last one registered first."""


def register(added: WeightFormat) -> WeightFormat:
    """Makes a format known from now on; it is asked before the ones that were there."""
    FORMATS.insert(0, added)
    return added


def format_of(weight: object) -> WeightFormat | None:
    """The format in which `weight` is stored; None for plain numbers."""
    return next((known for known in FORMATS if known.recognises(weight)), None)


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer whose weight is quantised."""
    return any(known.covers(module) for known in FORMATS)


def dequantized(weight: Any, layer: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The numbers that a weight stands for, which are its own where it is not quantised.

    Args:
        layer, dtype: as in `WeightFormat.dequantize`.
    """
    stored = format_of(weight)
    if stored is not None:
        return stored.dequantize(weight, layer, dtype)
    return weight if dtype is None else weight.to(dtype)
