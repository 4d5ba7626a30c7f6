"""Checkpoints of NVIDIA's ModelOpt: floating point of 8 bits (E4M3), and of 4 bits (NVFP4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.models.quantization.bits import floats, numbers
from lorakit.models.quantization.fp8 import block_shape, blockwise
from lorakit.models.quantization.packed import PackedBackend, Packing, Roles

if TYPE_CHECKING:
    import torch

    from lorakit.models.shards import StoredTensor


class ModelOpt(PackedBackend):
    """`W = weight · weight_scale`, and for NVFP4 times `weight_scale_2`, one number, as well.

    `weight` is float8 with one scale or one for each row or block, or uint8 with two values of 4
    bits (E2M1) in a byte and a float8 scale for each 16 of them.
    """

    name = "modelopt"
    roles: ClassVar[Roles] = {"q": ".weight", "scales": ".weight_scale", "whole": ".weight_scale_2"}
    anchor = "scales"
    required = ("q", "scales")
    unread = (".input_scale", ".k_scale", ".v_scale")

    def layout(
        self, stem: str, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        q, scales = parts["q"], parts["scales"].shape
        if q.code != "U8":
            return q.shape, {"block": block_shape(q.shape, scales)}
        *rows, half = q.shape
        if "whole" not in parts or (*rows,) != scales[:-1] or 2 * half % scales[-1]:
            raise ValueError
        return (*rows, 2 * half), {}

    def values(
        self, parts: Mapping[str, torch.Tensor], packing: Packing, dtype: torch.dtype
    ) -> torch.Tensor:
        stored, scales = packing.parts["q"], parts["scales"].to(dtype)
        if stored.code != "U8":
            return blockwise(numbers(parts["q"], stored.dtype, dtype), scales, packing.details)
        scales = scales * parts["whole"].to(dtype)
        W = floats(parts["q"], dtype).unflatten(-1, (scales.shape[-1], -1))
        return W.mul_(scales.unsqueeze(-1)).flatten(-2)
