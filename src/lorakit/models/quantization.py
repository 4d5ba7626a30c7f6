"""Base models whose weights are stored in 4 or 8 bits: how they are asked for, and taken back.

bitsandbytes stores and computes them, through transformers. The adapters beside such layers are in
`lora/layers/quantized.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, did_you_mean, first_line

if TYPE_CHECKING:
    import torch

BITS = {"nf4": 4, "fp4": 4, "int8": 8}
"""The ways in which weights are quantised, and the bits that each takes."""

UNQUANTIZED = "none"
"""The word for a base that is not quantised, where an adapter's record says otherwise."""

_COMPUTE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Quantization:
    """How the weights of a base model's linear layers are stored.

    Args:
        type: `nf4` (Dettmers et al. 2023, arXiv:2305.14314), `fp4` or `int8` (Dettmers et al.
            2022, arXiv:2208.07339).
        double_quantization: whether the scales of 4 bits are quantised too; None is yes.
        compute_dtype: in which weights of 4 bits are multiplied; None is the model's dtype.
    """

    type: str
    double_quantization: bool | None = None
    compute_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.type not in tuple(BITS):
            near = did_you_mean(str(self.type), BITS)
            raise InputError(f"quantization: {self.type!r} is none of {', '.join(BITS)}{near}")
        if self.double_quantization not in (None, True, False):
            raise InputError("quantization.double_quantization should be true or false")
        if self.compute_dtype not in (None, *_COMPUTE_DTYPES):
            raise InputError(
                f"quantization.compute_dtype should be one of {', '.join(_COMPUTE_DTYPES)}, not "
                f"{self.compute_dtype!r}"
            )
        given = (self.double_quantization, self.compute_dtype)
        if BITS[self.type] == 8 and given != (None, None):
            raise InputError(
                "quantization: double_quantization and compute_dtype are for 4 bits (nf4, fp4): "
                "leave them out with int8"
            )

    def settings(self, dtype: torch.dtype) -> Any:
        """transformers' configuration of it, for a model in `dtype`.

        Raises:
            InputError: bitsandbytes is not installed.
        """
        import torch
        from transformers import BitsAndBytesConfig

        if not find_spec("bitsandbytes"):
            raise InputError(
                f"quantization: {self.type} needs bitsandbytes: pip install 'lorakit[quant]'"
            )
        if BITS[self.type] == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.type,
            bnb_4bit_use_double_quant=self.double_quantization is not False,
            bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype or "", dtype),
        )

    def __str__(self) -> str:
        once = ", scales as they are" if self.double_quantization is False else ""
        return self.type + once + (f", computed in {self.compute_dtype}" * bool(self.compute_dtype))


def as_quantization(value: Any) -> Quantization | None:
    """A recipe's or a user's word for it: its type, or a mapping with the fields of `Quantization`.

    Raises:
        InputError: it is something else.
    """
    if value is None or isinstance(value, Quantization) or value == UNQUANTIZED:
        return None if value == UNQUANTIZED else value
    if isinstance(value, str):
        return Quantization(value)
    if not isinstance(value, Mapping):
        raise InputError(
            f"quantization should be one of {', '.join(BITS)}, or a mapping with type and "
            f"double_quantization, not {value!r}"
        )
    known = [field.name for field in fields(Quantization)]
    for key in value:
        if key not in known:
            raise InputError(f"quantization.{key} is not a key{did_you_mean(str(key), known)}")
    if "type" not in value:
        raise InputError(f"quantization.type is missing: give one of {', '.join(BITS)}")
    return Quantization(**value)


def loading_options(
    quantization: Quantization | None, dtype: torch.dtype, device: str, whole: Sequence[str] = ()
) -> dict[str, Any]:
    """What `from_pretrained` is told to quantise a model while it loads it.

    Args:
        whole: modules that stay as they are, beside those that transformers leaves alone.

    Raises:
        InputError: as in `Quantization.settings`.
    """
    import torch

    if quantization is None:
        return {}
    if dtype == torch.float64:
        raise InputError("quantization has no float64: give another dtype")
    settings = quantization.settings(dtype)
    settings.llm_int8_skip_modules = list(whole) or None
    return {"quantization_config": settings, "device_map": {"": device}}


def kept_whole(path: Path, task_type: str, labels: Sequence[str]) -> list[str]:
    """Modules of the model at `path` that must not be quantised in its form for `task_type`.

    A classifier's head is new, and so is what the model's files lack: they are trained whole.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    from lorakit.models.folders import shards_in
    from lorakit.models.shards import all_tensors
    from lorakit.models.skeleton import file_names, skeleton

    model = skeleton(path, task_type, labels=labels)
    names = file_names(model, all_tensors(shards_in(path)))
    kept = {name for name, child in model.named_children() if child is not model.base_model}
    if not names.converted:
        own = (name for name, _ in model.named_parameters())
        kept |= {name.rpartition(".")[0] for name in own if name not in names.stored}
    return sorted({*kept, *get_keys_to_not_convert(model)})


def quantize_again(model: Any, options: Mapping[str, Any]) -> Any:
    """A loaded, plain `model` as transformers loads it with `options`; it is used up.

    For models that are not read from a folder of safetensors.
    """
    loaded = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=dict(model.state_dict()),
        dtype=model.dtype,
        **options,
    )
    loaded.generation_config = model.generation_config
    return loaded


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """`model`, frozen and ready for adapters, as PEFT's function of this name leaves it.

    For scripts with a trainer of their own; `train` does all of it by itself. Unlike PEFT's it
    leaves norms, embeddings and heads in their dtype: the norms of transformers' models compute in
    float32 whatever their weights are.

    Args:
        use_gradient_checkpointing: compute activations again in the backward pass.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint`; None is `use_reentrant=False`.
        auto_clear_cache: as in PEFT's function; nothing is converted, so that nothing is left.
    """
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {"use_reentrant": False}
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)(options)
        if options.get("use_reentrant", True):  # which needs an input with gradients
            model.enable_input_require_grads()
    return keep_exact(model)


def keep_exact(model: Any) -> Any:
    """`model`, whose weights of 4 bits stay as they are quantised when it is evaluated."""
    from lorakit.lora.layers.quantized import forbid_packing

    for module in model.modules():
        forbid_packing(module)
    return model


def quantized_when_loaded(model: Any) -> bool:
    """Whether the weights in the model's own files are not quantised, and those in memory are."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is not None and not quantizer.pre_quantized


def _unpack(model: Any) -> None:
    """Gives layers with weights of torchao plain ones, which transformers itself cannot."""
    from torch import nn

    from lorakit.lora.layers.quantized import dequantized, from_torchao

    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if from_torchao(weight):
                plain = nn.Parameter(dequantized(weight), requires_grad=False)
                setattr(module, name, plain)
    model.hf_quantizer.remove_quantization_config(model)


def dequantized(model: Any, dtype: torch.dtype) -> Any:
    """`model` with plain weights of `dtype`, where they are quantised.

    Raises:
        InputError: they cannot be had.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return model
    try:
        if model.hf_quantizer.quantization_config.quant_method == "torchao":
            _unpack(model)
        else:
            model = model.dequantize()
    except (NotImplementedError, ValueError, RuntimeError, ImportError) as error:
        raise InputError(
            f"model: {model.config._name_or_path} is quantised in a way that transformers cannot "
            f"take back ({first_line(error)}): give the model that it was made of"
        ) from error
    model._weight_conversions = None  # those of reading packed weights: they cannot be reversed
    return model.to(dtype)
