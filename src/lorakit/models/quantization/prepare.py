"""Loaded models with quantised weights: prepared for training, kept exact, unpacked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, first_line
from lorakit.models.quantization.backend import backends
from lorakit.weight_formats import format_of

if TYPE_CHECKING:
    import torch


_NOT_WIDENED = ("gptq", "aqlm", "eetq", "hqq", "torchao")
"""Methods of quantisation beside which PEFT leaves all other parameters in their dtype."""


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """`model`, frozen and ready for adapters, as PEFT's function of this name leaves it.

    For scripts with a trainer of their own. `lorakit.train` does without the copies in float32
    that are made here of norms, embeddings and heads in float16 or bfloat16.

    Args:
        use_gradient_checkpointing: compute activations again in the backward pass.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint`; None is `use_reentrant=False`.
        auto_clear_cache: give the memory of the narrower copies back to the GPU.
    """
    import torch

    model.requires_grad_(False)
    if getattr(model, "quantization_method", None) not in _NOT_WIDENED:
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and not format_of(parameter):
                parameter.data = parameter.data.float()
        for device in (torch.cuda, torch.xpu) if auto_clear_cache else ():
            if device.is_available():
                device.empty_cache()
    if use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {"use_reentrant": False}
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)(options)
        if options.get("use_reentrant", True):  # which needs an input with gradients
            model.enable_input_require_grads()
    return keep_exact(model)


def keep_exact(model: Any) -> Any:
    """`model`, whose quantised weights are not rounded again in evaluation mode."""
    for module in model.modules():
        if stored := format_of(getattr(module, "weight", None)):
            stored.keep_exact(module)
    return model


def quantized_when_loaded(model: Any) -> bool:
    """Whether the weights in the model's own files are not quantised, and those in memory are."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and not quantizer.pre_quantized


def dequantized_model(model: Any, dtype: torch.dtype) -> Any:
    """`model` with unpacked weights of `dtype`; as it is where it is not quantised.

    Raises:
        InputError: transformers cannot unpack them.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return model
    method = model.hf_quantizer.quantization_config.quant_method
    known = next((backend for backend in backends() if backend.name == method), None)
    try:
        model = known.unpack(model) if known else model.dequantize()
    except (NotImplementedError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"model: {model.config._name_or_path} is quantised in a way that transformers cannot "
            f"undo ({first_line(error)}): give the model that it was made of"
        ) from error
    model._weight_conversions = None  # for reading packed weights; they cannot be reversed
    return model.to(dtype)
