"""Other weights in the place of an adapter's, in a live (also a compiled) model."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.checkpoint import PREFIX, load_initial, load_tensors, read_adapter, read_initial
from lorakit.lora.config import LoraConfig
from lorakit.lora.fitting import fitted
from lorakit.lora.layers import LoraLayer, LoraParameter
from lorakit.lora.locate import locate
from lorakit.lora.model import LoraModel
from lorakit.lora.peft_api.in_place import bank_of
from lorakit.lora.vocabulary import put_frozen, split_frozen
from lorakit.lora.wrapping import adapter_modules, wrapped_modules

_FACTOR = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.|$)")


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> None:
    """Puts the weights and scalings of an adapter's folder into adapter `adapter_name`, in place.

    The smaller rank is padded with zeros and a module that the new adapter does not adapt gets an
    update of zero; both leave the result exact. No value is changed when something does not fit.
    The adapter's configuration says its new ranks and scalings.

    Args:
        model: a `LoraModel`, or one with injected adapters; it may be compiled.
        torch_device: as in PEFT's function; values go where the old ones are.
        hub: as in `LoraModel.from_pretrained`.

    Raises:
        InputError: the adapter is merged, the new one has modules that the old one lacks, or
            lacks what the old one has trained whole, or one starts from other factors (PiSSA,
            OLoRA) than the other.
    """
    folder = locate(model_name_or_path, subfolder, **hub)
    bank, _ = bank_of(model)
    bank.require(adapter_name)
    base = bank.get_base_model()
    config, tensors, initial = fitted(base, *read_adapter(folder), read_initial(folder), folder)
    tensors, frozen = split_frozen(base, tensors, bank.adapter_tensors(adapter_name))
    put_frozen(base, frozen, folder, alone=False)
    layers = {
        path: layer
        for path, layer in adapter_modules(base, adapter_name)
        if isinstance(layer, LoraLayer) and adapter_name in layer.r
    }
    _require_same_start(bank.peft_config[adapter_name], config, folder)
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise InputError(f"'{adapter_name}' is merged into the weights: unmerge it first")
    for key in bank.adapter_tensors(adapter_name).keys() - tensors.keys():
        if not _FACTOR.search(key):
            dora = "lora_magnitude" in key
            what = "DoRA cannot be swapped for an adapter without" if dora else "use load_adapter"
            raise InputError(f"{folder} has no {key}: {what}")
    for path, layer in layers.items():
        if f"{PREFIX}{path}.{next(iter(layer.adapter_tensors(adapter_name)))}" in tensors:
            rank = config.rank_for(_place(path, layer))
            _grow(layer, adapter_name, max(rank, layer.r[adapter_name]))
    _record(bank, adapter_name, layers, bank.peft_config[adapter_name])
    parameters = bank.adapter_tensors(adapter_name)
    padded: dict[str, torch.Tensor] = {}
    for key, parameter in parameters.items():
        groups = _groups(layers.get(key.removeprefix(PREFIX).partition(".lora_")[0]))
        padded[key] = (
            _padded(tensors[key], parameter, groups)
            if key in tensors
            else torch.zeros_like(parameter)
        )
    load_tensors(parameters, {**tensors, **padded}, folder)
    if config.init.kind.subtracted:
        load_initial(base, adapter_name, initial, config, folder)
    for path, layer in layers.items():
        place = _place(path, layer)
        layer.rescale(adapter_name, config.alpha_for(place), config.scaling_for(place))
    _record(bank, adapter_name, layers, config)


def _record(
    bank: LoraModel, name: str, layers: Mapping[str, LoraLayer], config: LoraConfig
) -> None:
    """Makes the configuration of adapter `name` say what its layers are, as `config` if it can."""
    ranks = {_place(path, layer): layer.r[name] for path, layer in layers.items()}
    scalings = {_place(path, layer): layer.own_scaling(name) for path, layer in layers.items()}
    if any((config.rank_for(p), config.scaling_for(p)) != (ranks[p], scalings[p]) for p in ranks):
        alphas = {path: scalings[path] * rank for path, rank in ranks.items()}
        config = config.with_ranks(ranks, alphas, use_rslora=False)
    fields = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    bank.peft_config[name] = dataclasses.replace(
        bank.peft_config[name], **{field: getattr(config, field) for field in fields}
    )


def _require_same_start(own: LoraConfig, new: LoraConfig, folder: Path) -> None:
    """Raises InputError unless both adapters subtract the same initial factors, or none."""
    mine, theirs = (
        (one.init_lora_weights, one.r, one.rank_pattern) if one.init.kind.subtracted else None
        for one in (own, new)
    )
    if mine != theirs:
        raise InputError(
            f"{folder} starts from other factors (init_lora_weights={new.init_lora_weights!r}, "
            f"r={new.r}) than the adapter in its place ({own.init_lora_weights!r}, r={own.r}): "
            "save them with path_initial_model_for_weight_conversion, or use load_adapter"
        )


def _place(path: str, layer: LoraLayer) -> str:
    """The path that patterns of ranks and alphas are matched against."""
    if not isinstance(layer, LoraParameter):
        return path
    return f"{path.replace('.base_layer', '')}.{layer.parameter_name}"


def _groups(layer: LoraLayer | None) -> int:
    """How many groups a convolution has, or experts a parameter: each has its own rows of `A`."""
    if isinstance(layer, LoraParameter):
        return layer.num_experts
    return getattr(layer.get_base_layer(), "groups", 1) if layer is not None else 1


def _padded(tensor: torch.Tensor, like: torch.Tensor, groups: int) -> torch.Tensor:
    """`tensor` with zeros up to the rank of `like`: more rows of `A`, more columns of `B`.

    Each group of a convolution and each expert has its own rows of `A`, and gets its own zeros.
    """
    missing = [n - own for n, own in zip(like.shape, tensor.shape, strict=False)]
    if tensor.dim() != like.dim() or min(missing) < 0 or sum(n > 0 for n in missing) != 1:
        return tensor  # it fits, or it is another model's
    if missing[0] and groups > 1:
        by_group = tensor.unflatten(0, (groups, -1)), like.unflatten(0, (groups, -1))
        return _padded(*by_group, groups=1).flatten(0, 1)
    return F.pad(tensor, [n for more in reversed(missing) for n in (0, more)])


def prepare_model_for_compiled_hotswap(model: nn.Module, *, target_rank: int | None = None) -> None:
    """Gives all adapters of `model` the rank `target_rank`, so that swapping changes no shape.

    The new rows of `A` and columns of `B` are zeros, which change nothing. To be called before
    `torch.compile`, which would compile again for another shape.

    Raises:
        InputError: there is no adapter, or one has a larger rank already.
    """
    if not any(isinstance(module, LoraLayer) for module in model.modules()):
        raise InputError("No adapter layers found in the model")
    if target_rank is None:
        return
    bank, _ = bank_of(model)
    found = wrapped_modules(bank.get_base_model())
    layers = [(path, module) for path, module in found if isinstance(module, LoraLayer)]
    for path, layer in layers:
        for name in layer.adapters:
            if layer.r[name] > target_rank:
                raise InputError(f"{path} has rank {layer.r[name]}: more than {target_rank}")
            _grow(layer, name, target_rank)
    for name in bank.adapters:
        own = {path: layer for path, layer in layers if name in layer.r}
        _record(bank, name, own, bank.peft_config[name])


@torch.no_grad()
def _grow(layer: LoraLayer, name: str, rank: int) -> None:
    """Gives adapter `name` of a layer a larger rank, with zeros."""
    before = layer.r[name]
    if rank == before:
        return
    groups = _groups(layer)
    if rank % groups and not isinstance(layer, LoraParameter):
        raise InputError(f"a convolution with groups needs a rank that they divide, not {rank}")
    for tensor, axis in zip(layer.initial_places(name), (0, 1), strict=True):
        shape = list(tensor.shape)
        shape[axis] = shape[axis] * rank // before
        grown = _padded(tensor.detach(), tensor.new_empty(shape), groups)
        tensor.data, tensor.grad = grown, None  # the very parameter that an optimiser may hold
    layer.r[name] = rank
