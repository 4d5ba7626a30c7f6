"""Tiny models in the forms in which quantised checkpoints are published, packed one value a time.

Each form is written as its tools write it (names, shapes, dtypes, order of values, offsets of zero
points), by loops over whole numbers that have nothing in common with how they are read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tiny import save_tiny_model

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""The tensors in place of a weight, by the ends of their names, and what they stand for."""


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, m) whole numbers as (n, m · bits / 32) int32, the first value in the lowest bits."""
    rows = []
    for row in values.tolist():
        number = sum(value << (bits * i) for i, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def rounded(W: torch.Tensor, groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, ...]:
    """Whole numbers, zeros and float16 scales of each group of `W`, and what they stand for."""
    q, What = torch.empty_like(W, dtype=torch.int64), torch.empty_like(W)
    count, most = int(groups.max()) + 1, 2**bits - 1
    zeros, scales = torch.empty(len(W), count, dtype=torch.int64), torch.empty(len(W), count)
    for g in range(count):
        part = W[:, groups == g]
        low, high = part.amin(1).clamp(max=-1e-3), part.amax(1).clamp(min=1e-3)
        scale = ((high - low) / most).half().float()
        zero = (-low / scale).round().clamp(1, most)
        own = ((part / scale[:, None]).round() + zero[:, None]).clamp(0, most)
        q[:, groups == g], zeros[:, g], scales[:, g] = own.long(), zero.long(), scale
        What[:, groups == g] = (own - zero[:, None]) * scale[:, None]
    return q, zeros, scales.half(), What


def even_groups(d_in: int, size: int) -> torch.Tensor:
    return torch.arange(d_in) // size


def gptq(W: torch.Tensor, bits: int = 4, shuffled: bool = False, below: int = 1) -> Packed:
    groups = even_groups(W.shape[1], 16)
    if shuffled:
        groups = groups[torch.randperm(len(groups))]
    q, zeros, scales, What = rounded(W, groups, bits)
    parts = {
        "qweight": words(q, bits).T.contiguous(),
        "qzeros": words(zeros.T - below, bits),
        "scales": scales.T.contiguous(),
        "g_idx": groups.int(),
    }
    return parts, What


def awq(W: torch.Tensor) -> Packed:
    q, zeros, scales, What = rounded(W, even_groups(W.shape[1], 16), 4)

    def interleaved(values: torch.Tensor) -> torch.Tensor:
        places = [8 * (i // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[i % 8] for i in range(values.shape[1])]
        return words(values[:, places], 4)

    parts = {
        "qweight": interleaved(q.T),
        "qzeros": interleaved(zeros.T),
        "scales": scales.T.contiguous(),
    }
    return parts, What


def blocks(W: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float8, a scale for each block of size × size, and what they stand for."""
    height, width = W.shape
    scales = torch.empty(-(-height // size), -(-width // size))
    q, What = torch.empty_like(W, dtype=torch.float8_e4m3fn), torch.empty_like(W)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(size * i, size * (i + 1)), slice(size * j, size * (j + 1)))
            scales[i, j] = W[at].abs().max() / 448
            q[at] = (W[at] / scales[i, j]).to(torch.float8_e4m3fn)
            What[at] = q[at].float() * scales[i, j]
    return q, scales, What


def fp8(W: torch.Tensor) -> Packed:
    q, scales, What = blocks(W, 20)  # which does not divide the widths of the tiny model
    return {"weight": q, "weight_scale_inv": scales}, What


def row_fp8(W: torch.Tensor) -> Packed:
    scales = W.abs().amax(1, keepdim=True) / 448
    q = (W / scales).to(torch.float8_e4m3fn)
    parts = {"weight": q, "weight_scale": scales, "input_scale_ub": torch.tensor([1200.0])}
    return parts, q.float() * scales


def ct_pack(W: torch.Tensor, shuffled: bool = False) -> Packed:
    groups = even_groups(W.shape[1], 16)
    if shuffled:
        groups = groups[torch.randperm(len(groups))]
    q, zeros, scales, What = rounded(W, groups, 4)
    parts = {
        "weight_packed": words(q, 4),
        "weight_zero_point": words(zeros.T, 4).T.contiguous(),
        "weight_scale": scales,
        "weight_shape": torch.tensor(W.shape),
    }
    if shuffled:
        parts["weight_g_idx"] = groups.int()
    return parts, What


def ct_symmetric(W: torch.Tensor) -> Packed:
    """Without zero points, as the experts of Kimi K2."""
    grouped = W.unflatten(1, (-1, 16))
    scales = (grouped.abs().amax(-1) / 7).bfloat16()
    q = (grouped / scales.float().unsqueeze(-1)).round().clamp(-8, 7)
    parts = {
        "weight_packed": words((q + 8).flatten(1).long(), 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor(W.shape, dtype=torch.int32),
    }
    return parts, (q * scales.float().unsqueeze(-1)).flatten(1)


def ct_channel(dtype: torch.dtype) -> Callable[[torch.Tensor], Packed]:
    def pack(W: torch.Tensor) -> Packed:
        most = 127 if dtype == torch.int8 else 448
        scales = W.abs().amax(1, keepdim=True) / most
        q = (W / scales).round().to(dtype) if most == 127 else (W / scales).to(dtype)
        return {"weight": q, "weight_scale": scales.bfloat16()}, q.float() * scales.bfloat16()

    return pack


def e2m1(W: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`W` (…, n) over `scales` (…, n / size) in 4 bits, two in a byte, and what they stand for."""
    levels = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    levels += [-level for level in levels]
    wide = scales.repeat_interleave(W.shape[-1] // scales.shape[-1], -1)
    codes = ((W / wide)[..., None] - torch.tensor(levels)).abs().argmin(-1)
    bytes_ = torch.tensor(
        [low | high << 4 for low, high in codes.reshape(-1, 2).tolist()], dtype=torch.uint8
    )
    return bytes_.view(*W.shape[:-1], -1), torch.tensor(levels)[codes] * wide


def ct_nvfp4(W: torch.Tensor) -> Packed:
    whole = torch.tensor([448 * 6 / float(W.abs().max())])
    scales = W.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * whole
    scales = scales.to(torch.float8_e4m3fn)
    q, What = e2m1(W, scales.float() / whole)
    return {"weight_packed": q, "weight_scale": scales, "weight_global_scale": whole}, What


def nv_fp8(W: torch.Tensor) -> Packed:
    scale = W.abs().max() / 448
    q = (W / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale, "input_scale": torch.tensor(0.5)}, q.float() * scale


def nv_fp4(W: torch.Tensor) -> Packed:
    whole = W.abs().max() / (448 * 6)
    scales = (W.unflatten(1, (-1, 16)).abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    q, What = e2m1(W, scales.float() * whole)
    return {"weight": q, "weight_scale": scales, "weight_scale_2": whole}, What


def mxfp4(experts: torch.Tensor) -> Packed:
    """gpt-oss's form of stacked experts (experts, d_in, d_out)."""
    W = experts.transpose(1, 2).contiguous()
    grouped = W.unflatten(-1, (-1, 32))
    exponents = (grouped.abs().amax(-1) / 6).log2().ceil()
    q, What = e2m1(grouped, exponents.exp2().unsqueeze(-1))
    parts = {"blocks": q, "scales": (exponents + 127).to(torch.uint8)}
    return parts, What.flatten(-2).transpose(1, 2)


def _ct(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": False}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}

FORMS: dict[str, tuple[Callable[[torch.Tensor], Packed], dict[str, Any]]] = {
    "gptq": (gptq, {**_GPTQ, "desc_act": False}),
    "gptq-shuffled": (
        lambda W: gptq(W, shuffled=True),
        {**_GPTQ, "desc_act": True, "checkpoint_format": "gptq"},
    ),
    "gptq-v2": (lambda W: gptq(W, 8, below=0), {**_GPTQ, "checkpoint_format": "gptq_v2"}),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
    ),
    "fp8": (
        fp8,
        {"quant_method": "fp8", "weight_block_size": [20, 20], "activation_scheme": "dynamic"},
    ),
    "fbgemm": (row_fp8, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "ct-pack": (ct_pack, _ct("pack-quantized", **_INT4)),
    "ct-shuffled": (
        lambda W: ct_pack(W, shuffled=True),
        _ct("pack-quantized", **_INT4, actorder="group"),
    ),
    "ct-symmetric": (ct_symmetric, _ct("pack-quantized", **{**_INT4, "symmetric": True})),
    "ct-int8": (
        ct_channel(torch.int8),
        _ct("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True),
    ),
    "ct-float8": (
        ct_channel(torch.float8_e4m3fn),
        _ct("float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True),
    ),
    "ct-nvfp4": (
        ct_nvfp4,
        _ct("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group"),
    ),
    "modelopt-fp8": (nv_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt-nvfp4": (nv_fp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}
"""How each form packs a weight, and what `config.json` says of it."""


def save_packed(form: str, folder: Path) -> dict[str, torch.Tensor]:
    """Writes the tiny model with its linear layers in `form`; returns what they stand for."""
    pack, settings = FORMS[form]
    save_tiny_model(folder, hidden_size=64)
    torch.manual_seed(5)
    return replace_weights(folder, pack, settings, lambda name: name.endswith("_proj.weight"))


def replace_weights(
    folder: Path,
    pack: Callable[[torch.Tensor], Packed],
    settings: dict[str, Any],
    chosen: Callable[[str], bool],
    mark: str = ".",
) -> dict[str, torch.Tensor]:
    """Packs the weights in `folder` whose names are `chosen`; returns what they stand for."""
    tensors, stands_for = load_file(folder / "model.safetensors"), {}
    for name in sorted(filter(chosen, tensors)):
        parts, stands_for[name] = pack(tensors.pop(name))
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}{mark}{end}": part.contiguous() for end, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    return stands_for
