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
    """One form of quantised weights. A subclass must define `recognises` and `dequantize`.

    Attributes:
        name: used in messages.
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
        """Whether `layer` is a linear layer with such a weight."""
        return self.recognises(getattr(layer, "weight", None))

    def dequantize(self, weight: Any, layer: Any, dtype: torch.dtype | None) -> torch.Tensor:
        """The unpacked weight (d_out, d_in).

        Args:
            layer: the weight's layer, None where it is not known.
            dtype: of the result, which is rounded once; None for the format's own.
        """
        raise NotImplementedError

    def numel(self, weight: Any) -> int:
        """The number of values in the unpacked weight."""
        return weight.numel()

    def quantize(self, W: torch.Tensor, like: Any) -> nn.Parameter | None:
        """`W` (d_out, d_in) quantised as `like` is; None if a merged weight stays unpacked."""
        return None

    def restored(self, weight: Any) -> None:
        """Called when unmerging has put `weight` back into its layer."""

    def keep_exact(self, layer: Any) -> None:
        """Keeps `layer` from rounding its stored weight again in evaluation mode."""

    def require_gradients(self, weight: Any) -> None:
        """Raises InputError if no gradients flow through `weight` to the layer's input."""


FORMATS: list[WeightFormat] = []
"""All registered formats, the last one first."""


def register(added: WeightFormat) -> WeightFormat:
    """Registers a format; it takes precedence over those registered before."""
    FORMATS.insert(0, added)
    return added


def format_of(weight: object) -> WeightFormat | None:
    """The format in which `weight` is stored; None where it is not quantised."""
    return next((known for known in FORMATS if known.recognises(weight)), None)


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer whose weight is quantised."""
    return any(known.covers(module) for known in FORMATS)


def dequantized(weight: Any, layer: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The unpacked weight; `layer` and `dtype` are those of `WeightFormat.dequantize`."""
    stored = format_of(weight)
    if stored is not None:
        return stored.dequantize(weight, layer, dtype)
    return weight if dtype is None else weight.to(dtype)
