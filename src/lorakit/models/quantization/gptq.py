"""GPTQ's integers of 2 to 8 bits (Frantar et al. 2022, arXiv:2210.17323)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.errors import InputError
from lorakit.models.quantization.bits import integers
from lorakit.models.quantization.packed import PackedBackend, Packing, Roles, divided

if TYPE_CHECKING:
    import torch

    from lorakit.models.shards import StoredTensor


class GPTQ(PackedBackend):
    """`W[o, i] = scales[g, o] (q[i, o] - zeros[g, o])` with `g = g_idx[i]`, as AutoGPTQ writes it.

    `qweight` (d_in · bits / 32, d_out) and `qzeros` (groups, d_out · bits / 32) are int32, packed
    along inputs and outputs. `g_idx` (d_in,) is the group of each input, which `desc_act` shuffles.
    The format `gptq` stores `zeros - 1`, `gptq_v2` the zeros themselves. Bits and groups are taken
    from the shapes, as they may differ between layers (`dynamic`).
    """

    name = "gptq"
    roles: ClassVar[Roles] = {
        "q": ".qweight",
        "zeros": ".qzeros",
        "scales": ".scales",
        "groups": ".g_idx",
    }
    required = ("q", "zeros", "scales")

    def check(self, settings: Mapping[str, Any]) -> None:
        form = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if settings.get("is_marlin_format"):
            form = "marlin"
        if form not in ("gptq", "gptq_v2"):
            raise InputError(
                f"model: its weights are in GPTQ's checkpoint_format {form}, laid out for one "
                "kernel: give a checkpoint in the format gptq or gptq_v2"
            )

    def layout(
        self, stem: str, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]
    ) -> tuple[tuple[int, ...], dict[str, Any]]:
        words, d_out = parts["q"].shape
        groups, columns = parts["scales"].shape
        bits = divided(32 * parts["zeros"].shape[1], d_out)
        d_in = divided(32 * words, bits)
        order = parts.get("groups")
        if (
            columns != d_out
            or parts["zeros"].shape[0] != groups
            or (order is not None and order.shape != (d_in,))
            or bits > 8
        ):
            raise ValueError
        stored = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        size = settings.get("group_size", -1)
        if not isinstance(size, int) or size <= 0 or -(-d_in // size) != groups:
            size = -(-d_in // groups)
        return (d_out, d_in), {"bits": bits, "below": stored, "size": size}

    def values(
        self, parts: Mapping[str, torch.Tensor], packing: Packing, dtype: torch.dtype
    ) -> torch.Tensor:
        import torch

        (d_out, d_in), bits = packing.shape, packing.details["bits"]
        zeros = integers(parts["zeros"], bits, d_out).T.int()
        zeros = (zeros + packing.details["below"]) & ((1 << bits) - 1)
        W = integers(parts["q"].T, bits, d_in).to(dtype)
        groups = parts.get("groups")
        if groups is None:
            groups = torch.arange(d_in, device=W.device) // packing.details["size"]
        return scaled(W, zeros.to(dtype), parts["scales"].T.to(dtype), groups)


def scaled(
    q: torch.Tensor, zeros: torch.Tensor | None, scales: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """`(q - zeros[:, g]) scales[:, g]` in the memory of `q` (d_out, d_in).

    Args:
        zeros, scales: (d_out, groups).
        groups: (d_in,), the group `g` of each input.
    """
    import torch

    d_out, count = scales.shape
    size = q.shape[1] // count
    even = size * count == q.shape[1] and torch.equal(
        groups, torch.arange(q.shape[1], device=q.device, dtype=groups.dtype) // size
    )
    if even:  # no shuffled inputs: no copy of the scales for each of them
        view = q.view(d_out, count, size)
        if zeros is not None:
            view.sub_(zeros.unsqueeze(-1))
        view.mul_(scales.unsqueeze(-1))
        return q
    at = groups.long()
    return (q if zeros is None else q.sub_(zeros[:, at])).mul_(scales[:, at])
