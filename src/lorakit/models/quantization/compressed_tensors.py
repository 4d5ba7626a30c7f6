"""Checkpoints of llm-compressor: integers and floating point of 4 and 8 bits, in several forms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.errors import InputError
from lorakit.models.quantization.bits import floats, integers, numbers, powers_of_two
from lorakit.models.quantization.fp8 import block_shape, blockwise
from lorakit.models.quantization.gptq import scaled
from lorakit.models.quantization.packed import PackedBackend, Packing, Roles

if TYPE_CHECKING:
    import torch

    from lorakit.models.shards import StoredTensor


class CompressedTensors(PackedBackend):
    """`W = weight_scale (q - weight_zero_point)`, a scale for each group, row, block or weight.

    What `q` is follows from its dtype (compressed-tensors 0.20, `compressors/`):

    - `weight_packed` of int32 (`pack-quantized`): integers of 1 to 8 bits from -2^(bits - 1) on,
      packed along the inputs; `weight_shape` is (d_out, d_in), zero points are packed along the
      outputs, and `weight_g_idx` is the group of each input (`actorder: group`);
    - `weight_packed` of uint8 (`nvfp4-pack-quantized`, `mxfp4-pack-quantized`): E2M1, whose scales
      are divided by `weight_global_scale`, or are powers of two;
    - `weight` of int8 or float8 (`int-quantized`, `float-quantized`, `naive-quantized`).
    """

    name = "compressed-tensors"
    roles: ClassVar[Roles] = {
        "q": (".weight_packed", ".weight"),
        "scales": ".weight_scale",
        "zeros": ".weight_zero_point",
        "groups": ".weight_g_idx",
        "shape": ".weight_shape",
        "global": ".weight_global_scale",
    }
    anchor = "scales"
    required = ("q", "scales")
    unread = (
        *(".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale"),
        *(".output_zero_point", ".k_scale", ".v_scale", ".q_scale", ".k_zero_point"),
        ".v_zero_point",
    )

    def check(self, settings: Mapping[str, Any]) -> None:
        sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
        turned = (settings.get("transform_config") or {}).get("config_groups")
        if sparse != "dense" or turned:
            what = f"sparse ({sparse})" if sparse != "dense" else "rotated (transform_config)"
            raise InputError(
                f"model: its compressed-tensors weights are {what}, which cannot be unpacked: "
                "give the model before compression"
            )

    def layout(
        self, stem: str, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        q, scales = parts["q"], parts["scales"].shape
        if q.code in ("I32", "U8"):
            bits = 4 if q.code == "U8" else _bits(stem, settings)
            *rows, words = q.shape
            d_in = words * (8 if q.code == "U8" else 32) // bits
            if q.code == "I32":
                d_in = min(d_in, _inputs(parts, d_in))
            if len(scales) < 2 or d_in < scales[-1] or (*rows,) != scales[:-1]:
                raise ValueError
            return (*rows, d_in), {"bits": bits}
        scheme = _scheme(stem, settings)
        block = block_shape(q.shape, scales, scheme.get("block_structure"))
        return q.shape, {"block": block}

    def values(
        self, parts: Mapping[str, torch.Tensor], packing: Packing, dtype: torch.dtype
    ) -> torch.Tensor:
        import torch

        q, stored, scales = parts["q"], packing.parts["q"], parts["scales"]
        if scales.dtype == torch.uint8:
            scales = powers_of_two(scales, dtype)
        scales = scales.to(dtype)
        if stored.code == "U8":
            if "global" in parts:
                scales = scales / parts["global"].to(dtype)
            W = floats(q, dtype)
            return W.unflatten(-1, (scales.shape[-1], -1)).mul_(scales.unsqueeze(-1)).flatten(-2)
        if stored.code != "I32":
            W = numbers(q, stored.dtype, dtype)
            if "zeros" in parts:
                ones = torch.ones_like(W)
                W.sub_(blockwise(ones, parts["zeros"].to(dtype), packing.details))
            return blockwise(W, scales, packing.details)
        bits = packing.details["bits"]
        half, d_in = 1 << (bits - 1), packing.shape[-1]
        W = integers(q, bits, d_in).to(dtype)
        zeros = None
        if "zeros" in parts:
            zeros = integers(parts["zeros"].T, bits, packing.shape[0]).T.to(dtype)
        else:
            W.sub_(half)
        groups = parts.get("groups")
        if groups is None or bool((groups < 0).any()):
            groups = torch.arange(d_in, device=W.device) // -(-d_in // scales.shape[-1])
        return scaled(W, zeros, scales, groups)


def _inputs(parts: Mapping[str, StoredTensor], most: int) -> int:
    """d_in, which the last word of a row may have more room than."""
    if (stored := parts.get("shape")) is None:
        return most
    from lorakit.models.shards import ShardReader

    with ShardReader([stored.path]) as reader:
        return int(reader.read(stored)[-1])


def _bits(stem: str, settings: Mapping[str, Any]) -> int:
    bits = _scheme(stem, settings).get("num_bits")
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError
    return bits


def _scheme(stem: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the configuration says of the weight of the module `stem`.

    A group's targets are names, expressions (`re:…`) or classes; the closest one counts.
    """
    found: list[tuple[int, Mapping[str, Any]]] = []
    for group in (settings.get("config_groups") or {}).values():
        for target in group.get("targets") or ["Linear"]:
            if target.startswith("re:"):
                rank = 1 if re.match(target[3:], stem) else 3
            else:
                rank = 0 if stem == target or stem.endswith(f".{target}") else 2
            found.append((rank, group.get("weights") or {}))
    return min(found, key=lambda one: one[0])[1] if found else {}
