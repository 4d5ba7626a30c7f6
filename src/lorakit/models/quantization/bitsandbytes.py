"""bitsandbytes' linear layers of 8 bits (LLM.int8()) and of 4 bits (QLoRA)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models.quantization.backend import Backend

if TYPE_CHECKING:
    import torch
    from torch import nn

_SCALES = "lora_scales"
"""Where a weight of 8 bits keeps its scales; bitsandbytes moves them into its layer's state."""


def _settings(type: str, whole: list[str], **settings: Any) -> Any:
    from transformers import BitsAndBytesConfig

    if not find_spec("bitsandbytes"):
        raise InputError(f"quantization: {type} needs bitsandbytes: pip install 'lorakit[quant]'")
    return BitsAndBytesConfig(llm_int8_skip_modules=whole or None, **settings)


class _BitsAndBytes(Backend):
    name = "bitsandbytes"

    def unpack(self, model: Any) -> Any:
        return model.dequantize()


class FourBits(_BitsAndBytes):
    """`nf4` (Dettmers et al. 2023, arXiv:2305.14314) and `fp4`."""

    types = ("nf4", "fp4")
    options = ("double_quantization", "compute_dtype")
    fast_without_gradients = True

    def config(self, type: str, dtype: torch.dtype, whole: list[str], **options: Any) -> Any:
        import torch

        return _settings(
            type,
            whole,
            load_in_4bit=True,
            bnb_4bit_quant_type=type,
            bnb_4bit_use_double_quant=options.get("double_quantization", True),
            bnb_4bit_compute_dtype=getattr(torch, options.get("compute_dtype", ""), dtype),
        )

    def recognises(self, weight: object) -> bool:
        return type(weight).__name__ == "Params4bit"

    def dequantize(self, weight: Any, layer: Any, dtype: torch.dtype | None) -> torch.Tensor:
        from bitsandbytes import functional

        W = functional.dequantize_4bit(weight.data, weight.quant_state)
        return W if dtype is None else W.to(dtype)

    def numel(self, weight: Any) -> int:
        state = weight.quant_state  # two values lie in a byte
        return weight.numel() if state is None else state.shape.numel()

    def quantize(self, W: torch.Tensor, like: Any) -> nn.Parameter:
        from bitsandbytes.nn import Params4bit

        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        settings = {name: getattr(like, name) for name in names}
        W = W.detach().contiguous().to(like.quant_state.dtype)
        return Params4bit(W, requires_grad=False, **settings).to(like.device)

    def keep_exact(self, layer: Any) -> None:
        """Keeps the layout in which the weight was quantised.

        On CPUs with AVX512-BF16 bitsandbytes repacks it in evaluation mode: scales are rounded to
        bfloat16 for good, products are in bfloat16 whatever the input is, and the input gets no
        gradients.
        """
        if not hasattr(layer, "support_avx512bf16_for_cpu"):
            return
        layer.support_avx512bf16_for_cpu = False
        weight = layer.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            weight.data, weight.quant_state = _unrepacked(weight)

    def described(self, settings: Mapping[str, Any]) -> str | None:
        return settings.get("bnb_4bit_quant_type") if settings.get("load_in_4bit") else None


def _unrepacked(weight: Any) -> tuple[torch.Tensor, Any]:
    """A repacked weight and its state in the layout in which it was quantised."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    scales = weight.quant_state.absmax.T.reshape(-1).float()
    data, state = _convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
    if not state.nested:  # bitsandbytes 0.50 leaves these transposed
        state.absmax = scales
    return data, state


class EightBits(_BitsAndBytes):
    """`int8` (Dettmers et al. 2022, arXiv:2208.07339)."""

    types = ("int8",)
    rounds_input = True

    def config(self, type: str, dtype: torch.dtype, whole: list[str], **options: Any) -> Any:
        return _settings(type, whole, load_in_8bit=True)

    def recognises(self, weight: object) -> bool:
        return type(weight).__name__ == "Int8Params"

    def dequantize(self, weight: Any, layer: Any, dtype: torch.dtype | None) -> torch.Tensor:
        import torch

        scales = getattr(weight, _SCALES, None)
        if scales is None:
            scales = layer.state.SCB if weight.SCB is None else weight.SCB
            setattr(weight, _SCALES, scales)
        # 8-bit integers are exact in every dtype, so that this rounds once.
        whole = weight.data.to(dtype or torch.float32)
        return whole.mul_(scales.to(weight.device).mul(1 / 127).unsqueeze(1))

    def quantize(self, W: torch.Tensor, like: Any) -> nn.Parameter:
        from bitsandbytes.nn import Int8Params

        W = W.detach().contiguous()
        return Int8Params(W, requires_grad=False, has_fp16_weights=False).to(like.device)

    def restored(self, weight: Any) -> None:
        if hasattr(weight, _SCALES):  # the layer reads both anew at its next call
            weight.CB, weight.SCB = weight.data, getattr(weight, _SCALES)

    def described(self, settings: Mapping[str, Any]) -> str | None:
        return "int8" if settings.get("load_in_8bit") else None
