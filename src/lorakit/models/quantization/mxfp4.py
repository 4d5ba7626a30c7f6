"""Floating point of 4 bits with a power of two for each 32 values, as gpt-oss stores experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.models.quantization.bits import floats, powers_of_two
from lorakit.models.quantization.packed import PackedBackend, Packing, Roles

if TYPE_CHECKING:
    import torch

    from lorakit.models.shards import StoredTensor


class MXFP4(PackedBackend):
    """`W[e, i, o] = 2^(scales[e, o, i // 32] - 127) · blocks[e, o, i]` (OCP Microscaling 1.0).

    `blocks` (experts, d_out, d_in / 32, 16) and `scales` (experts, d_out, d_in / 32) are uint8.
    transformers' stacked experts are (experts, d_in, d_out).
    """

    name = "mxfp4"
    roles: ClassVar[Roles] = {"q": "_blocks", "scales": "_scales"}
    required = ("q", "scales")
    whole = ""

    def layout(
        self, stem: str, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        *rows, d_out, groups, half = parts["q"].shape
        if parts["scales"].shape != (*rows, d_out, groups):
            raise ValueError
        return (*rows, groups * half * 2, d_out), {}

    def values(
        self, parts: Mapping[str, torch.Tensor], packing: Packing, dtype: torch.dtype
    ) -> torch.Tensor:
        W = floats(parts["q"], dtype)
        W = W.mul_(powers_of_two(parts["scales"], dtype).unsqueeze(-1))
        return W.flatten(-2).transpose(-1, -2)
