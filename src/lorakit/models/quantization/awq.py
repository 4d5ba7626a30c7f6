"""AWQ's integers of 4 bits (Lin et al. 2023, arXiv:2306.00978)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.errors import InputError
from lorakit.models.quantization.bits import integers
from lorakit.models.quantization.packed import PackedBackend, Packing, Roles, divided

if TYPE_CHECKING:
    import torch

    from lorakit.models.shards import StoredTensor

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight outputs lies (`AWQ_REVERSE_ORDER` of AutoAWQ)."""


class AWQ(PackedBackend):
    """`W[o, i] = scales[g, o] (q[i, o] - zeros[g, o])` with `g = i // group_size`, as AutoAWQ's
    `gemm` writes it.

    `qweight` (d_in, d_out / 8), `qzeros` (groups, d_out / 8) are int32, packed along the outputs,
    of which eight lie in a word in an order of their own; `scales` (groups, d_out).
    """

    name = "awq"
    roles: ClassVar[Roles] = {"q": ".qweight", "zeros": ".qzeros", "scales": ".scales"}
    required = ("q", "zeros", "scales")

    def check(self, settings: Mapping[str, Any]) -> None:
        version = str(settings.get("version") or settings.get("format") or "gemm").lower()
        bits = settings.get("bits", settings.get("w_bit", 4))
        if version != "gemm" or bits != 4:
            raise InputError(
                f"model: its weights are AWQ's of {bits} bits in the version {version}: only gemm "
                "with 4 bits can be unpacked; give such a checkpoint"
            )

    def find(
        self, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]
    ) -> tuple[dict[str, Packing], set[str]]:
        if scaled := [name for name in tensors if name.endswith("act.scales")]:
            raise InputError(
                f"model: {scaled[0]} divides what an activation computes, which AWQ does in this "
                "family and transformers' model does not: give the model before quantisation"
            )
        return super().find(tensors, settings)

    def layout(
        self, stem: str, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        d_in, words = parts["q"].shape
        groups, d_out = parts["scales"].shape
        if d_out != 8 * words or parts["zeros"].shape != (groups, words):
            raise ValueError
        return (d_out, d_in), {"size": divided(d_in, groups)}

    def values(
        self, parts: Mapping[str, torch.Tensor], packing: Packing, dtype: torch.dtype
    ) -> torch.Tensor:
        d_out, d_in = packing.shape
        scales = parts["scales"].to(dtype)
        W = _in_order(parts["q"], d_out).to(dtype).view(len(scales), -1, d_out)
        W.sub_(_in_order(parts["zeros"], d_out).to(dtype).unsqueeze(1)).mul_(scales.unsqueeze(1))
        return W.view(d_in, d_out).T


def _in_order(words: torch.Tensor, d_out: int) -> torch.Tensor:
    """(n, d_out) of uint8 from (n, d_out / 8)."""
    values = integers(words, 4, d_out)
    return values.view(len(values), -1, 8)[..., _PLACES].reshape(len(values), d_out)
