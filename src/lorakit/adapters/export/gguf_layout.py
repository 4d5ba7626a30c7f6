"""What a family of models is called in llama.cpp, and how its tensors lie there.

A family is one entry of `FAMILIES` (`gguf_families.py`). Names of tensors come from the `gguf`
package's tables; what llama.cpp fixes in its code for a family (`src/models/`) and a configuration
may have otherwise is refused by `unlike`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf

if TYPE_CHECKING:
    import torch

Parts = list[tuple[str, "torch.Tensor"]]
Settings = dict[str, Any]
"""By the names of `GGUFWriter`'s methods, without `add_`."""


def no_settings(config: Any) -> Settings:
    """Of a family without settings of its own."""
    return {}


def as_llama_cpp(config: Any) -> str:
    """Nothing in the configuration is unlike what llama.cpp does."""
    return ""


@dataclass(frozen=True)
class GgufFamily:
    """How one of transformers' model types stands in llama.cpp.

    Attributes:
        activations: those that llama.cpp computes for it.
        interleaves: llama.cpp rotates neighbouring pairs where transformers rotates halves, so that
            the rows of the query and key projections change places.
        ropes: the kinds of rotary scaling that it computes.
        yarn: the settings of attention's scale that it has with the rotary scaling "yarn".
        norm_offset: what transformers adds to the weights of norms; llama.cpp's hold it.
        own_norms: the ends of names of norms to which nothing is added.
        windows: it keeps to the sliding windows of the configuration.
        settings: the family's own hyperparameters, also in the place of the usual ones.
        unlike: what a configuration has that llama.cpp does not compute, in words, or "".
        divided: the tensors of llama.cpp that one of the model's (d_out, …) becomes; None for the
            usual. As it moves and scales rows alone, it is right for the `B` of an adapter too.
        columns: the columns of a weight (d_out, d_in) in llama.cpp's order, those of `A` too.
        not_adapted: the ends of paths that llama.cpp multiplies without the adapter's factors.
    """

    arch: gguf.MODEL_ARCH
    activations: tuple[str, ...] = ("silu",)
    interleaves: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    yarn: tuple[str, ...] = ()
    norm_offset: float = 0.0
    own_norms: tuple[str, ...] = ()
    windows: bool = False
    settings: Callable[[Any], Settings] = no_settings
    unlike: Callable[[Any], str] = as_llama_cpp
    divided: Callable[[str, torch.Tensor, Any], Parts] | None = None
    columns: Callable[[str, torch.Tensor, Any], torch.Tensor] | None = None
    not_adapted: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """llama.cpp's word for it."""
        return str(gguf.MODEL_ARCH_NAMES[self.arch])

    def parts(self, name: str, tensor: torch.Tensor, config: Any) -> Parts:
        """What the model's tensor `name` becomes: names in transformers' manner, and values."""
        return self.divided(name, tensor, config) if self.divided else [(name, tensor)]

    def ordered(self, name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
        """A weight (…, d_in), or an adapter's `A`, with its columns in llama.cpp's order."""
        return self.columns(name, tensor, config) if self.columns else tensor


def together(*checks: Callable[[Any], str]) -> Callable[[Any], str]:
    """The first of these that finds something."""

    def unlike(config: Any) -> str:
        return next((found for check in checks if (found := check(config))), "")

    return unlike


def only(name: str, *values: Any) -> Callable[[Any], str]:
    """Of a setting llama.cpp knows these values alone; a configuration without it has the first."""

    def unlike(config: Any) -> str:
        own = getattr(config, name, values[0])
        return "" if own in values else f"{name}: {own}"

    return unlike
