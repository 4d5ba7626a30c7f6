"""Floating point of 8 bits (E4M3) with a scale for each block, each row or the whole weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.models.quantization.bits import numbers, powers_of_two
from lorakit.models.quantization.packed import PackedBackend, Packing, Roles

if TYPE_CHECKING:
    import torch

    from lorakit.models.shards import StoredTensor


class FP8(PackedBackend):
    """`W = weight · weight_scale_inv`, the latter one number for each block of 128 × 128 values.

    The form of DeepSeek V3 and of Qwen's FP8 checkpoints (DeepSeek-AI 2024, arXiv:2412.19437,
    section 3.3). Blocks at the edges may be smaller. A single scale is for the whole weight.
    """

    name = "fp8"
    roles: ClassVar[Roles] = {"q": "", "scales": "_scale_inv"}
    anchor = "scales"
    required = ("q", "scales")
    whole = ""
    unread: ClassVar[tuple[str, ...]] = (
        ".activation_scale",
        ".input_scale",
        ".k_scale",
        ".v_scale",
    )

    def layout(
        self, stem: str, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        shape, scales = parts["q"].shape, parts["scales"].shape
        return shape, {"block": block_shape(shape, scales, settings.get("weight_block_size"))}

    def values(
        self, parts: Mapping[str, torch.Tensor], packing: Packing, dtype: torch.dtype
    ) -> torch.Tensor:
        import torch

        scales = parts["scales"]
        if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
            scales = powers_of_two(scales.view(torch.uint8), dtype)
        W = numbers(parts["q"], packing.parts["q"].dtype, dtype)
        return blockwise(W, scales.to(dtype), packing.details)


class FbgemmFP8(FP8):
    """`W = weight · weight_scale`, a scale for each row, as Meta's FP8 checkpoints have it."""

    name = "fbgemm_fp8"
    roles: ClassVar[Roles] = {"q": "", "scales": "_scale"}
    unread = (".input_scale_ub", ".input_scale")


def block_shape(
    shape: tuple[int, ...], scales: tuple[int, ...], wanted: Any = None
) -> tuple[int, int] | None:
    """How many rows and columns a scale is for; None where one is for the whole weight.

    Args:
        shape: of the weight, (…, d_out, d_in).
        scales: of its scales.
        wanted: what the configuration says.

    Raises:
        ValueError: there are fewer or more scales than blocks.
    """
    if all(size == 1 for size in scales):
        return None
    *rows, height, width = shape
    if len(scales) == 1:  # a scale for each row
        scales = (*scales, 1)
    down, across = scales[-2:]
    sizes = [wanted] if wanted else []
    sizes += [(128, 128), (-(-height // down), -(-width // across))]
    for a, b in sizes:
        if (-(-height // a), -(-width // b)) == (down, across):
            break
    else:
        raise ValueError
    if (*rows,) != scales[:-2]:
        raise ValueError
    return a, b


def blockwise(W: torch.Tensor, scales: torch.Tensor, details: Mapping[str, Any]) -> torch.Tensor:
    """`W` (…, d_out, d_in), multiplied in place by a scale for each of its blocks."""
    if details["block"] is None:
        return W.mul_(scales.reshape(()))
    rows, columns = details["block"]
    if scales.dim() == 1:
        scales = scales.unsqueeze(-1)
    scales = scales.repeat_interleave(rows, -2)[..., : W.shape[-2], :]
    whole, rest = divmod(W.shape[-1], columns)
    if whole:
        blocks = W[..., : whole * columns].unflatten(-1, (whole, columns))
        blocks.mul_(scales[..., :whole, None])
    if rest:
        W[..., whole * columns :].mul_(scales[..., whole:])
    return W
