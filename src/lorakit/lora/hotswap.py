"""Other weights in the place of an adapter's, in a live (also a compiled) model."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.bank import AdapterBank
from lorakit.lora.checkpoint import PREFIX, load_tensors, read_adapter, without_base_copies
from lorakit.lora.folders import locate
from lorakit.lora.injection import wrapped_modules
from lorakit.lora.layers import LoraLayer


def hotswap_adapter(
    model: AdapterBank,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> None:
    """Puts the weights and scalings of an adapter's folder into adapter `adapter_name`, in place.

    A smaller rank is padded with zeros and a module that the new adapter does not adapt gets an
    update of zero; both leave the result exact. Nothing is changed when something does not fit.

    Args:
        torch_device: as in PEFT's function; values go where the old ones are.
        hub: as in `LoraModel.from_pretrained`.

    Raises:
        InputError: the new adapter has a larger rank, or modules that the old one lacks.
    """
    folder = locate(model_name_or_path, subfolder, **hub)
    config, tensors = read_adapter(folder)
    tensors = without_base_copies(model.get_base_model(), tensors, folder)
    parameters = model.adapter_tensors(adapter_name)
    fitted: dict[str, torch.Tensor] = {}
    for key, parameter in parameters.items():
        tensor = tensors.get(key)
        if tensor is None and "lora_magnitude" in key:
            raise InputError(
                f"{folder} has no {key}: DoRA cannot be swapped for an adapter without"
            )
        new = torch.zeros_like(parameter) if tensor is None else tensor
        fitted[key] = _padded(key, new, parameter, folder)
    load_tensors(parameters, {**tensors, **fitted}, folder)
    for path, layer in wrapped_modules(model.get_base_model()):
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            layer.rescale(adapter_name, config.alpha_for(path), config.scaling_for(path))


def _padded(key: str, tensor: torch.Tensor, like: torch.Tensor, folder: Path) -> torch.Tensor:
    """`tensor` with zeros up to the rank of `like`: more rows of `A`, more columns of `B`."""
    axis = 1 if ".lora_B." in key or key.endswith("lora_embedding_B") else 0
    ranked = "lora_A." in key or "lora_embedding_A" in key or axis == 1
    if not ranked or tensor.dim() < 2 or tensor.shape == like.shape:
        return tensor
    missing = like.shape[axis] - tensor.shape[axis]
    if missing < 0:
        raise InputError(
            f"{folder}: {key.removeprefix(PREFIX)} has rank {tensor.shape[axis]}, and the adapter "
            f"to be swapped {like.shape[axis]}: call "
            "prepare_model_for_compiled_hotswap with the largest rank first"
        )
    after = [0, 0] * (tensor.dim() - 1 - axis)
    return F.pad(tensor, (*after, 0, missing))


def prepare_model_for_compiled_hotswap(model: nn.Module, *, target_rank: int | None = None) -> None:
    """Gives all adapters of `model` the rank `target_rank`, so that larger ones can be swapped in.

    The new rows of `A` and columns of `B` are zeros, which change nothing. To be called before
    `torch.compile`.

    Raises:
        InputError: an adapter has a larger rank already.
    """
    if target_rank is None:
        return
    for path, layer in wrapped_modules(model):
        if not isinstance(layer, LoraLayer):
            continue
        for name in layer.adapters:
            if layer.r[name] > target_rank:
                raise InputError(
                    f"{path} has rank {layer.r[name]} already: more than {target_rank}"
                )
            for tensor, axis in zip(layer._initial_places(name), (0, 1), strict=True):
                grown = tensor.new_zeros(
                    [
                        n if i != axis else n // layer.r[name] * target_rank
                        for i, n in enumerate(tensor.shape)
                    ]
                )
                grown.narrow(axis, 0, tensor.shape[axis]).copy_(tensor.detach())
                torch.utils.swap_tensors(tensor, nn.Parameter(grown, tensor.requires_grad))
            layer.r[name] = target_rank
