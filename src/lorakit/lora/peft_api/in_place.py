"""PEFT's low-level functions: adapters in a model that is not wrapped, and state dictionaries.

`inject_adapter_in_model` leaves the model its own class; the bank of its adapters goes along as
an attribute, which the other functions look for.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.checkpoint import PREFIX, LoadResult, load_tensors
from lorakit.lora.config import LoraConfig
from lorakit.lora.key_names import as_peft_names, values_in, without_prefixes
from lorakit.lora.model import LoraModel
from lorakit.lora.parameters import count_parameters
from lorakit.lora.status import TunerLayerStatus, TunerModelStatus, layer_status, model_status
from lorakit.lora.vocabulary import frozen_embeddings, of_same_shape, put_frozen, split_frozen

_BANK = "lora_bank"


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Adds an adapter to `model` in place, and returns that model, not a `LoraModel`.

    Args:
        low_cpu_mem_usage: the adapter has no values until some are loaded.
        state_dict: the adapter's tensors, as `get_peft_model_state_dict` gives them: the modules
            that they belong to are the targets, whatever `peft_config` says. Values are not
            loaded.

    Raises:
        InputError: as `get_peft_model` does.
    """
    if state_dict is not None:
        peft_config = _targets_of(peft_config, state_dict)
    inner = getattr(model, "_orig_mod", model)  # a compiled model's own
    bank = vars(inner).get(_BANK)
    if bank is None:
        peft_config = copy.deepcopy(peft_config)
        bank = LoraModel(inner, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        vars(inner)[_BANK] = bank  # not as a submodule, which it would hold itself
        vars(inner)["peft_config"] = bank.peft_config
    else:
        bank.add_adapter(adapter_name, peft_config, low_cpu_mem_usage)
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: str | bool = "auto",
) -> dict[str, torch.Tensor]:
    """The tensors of an adapter under the keys of PEFT's files, without the adapter's name.

    Args:
        model: a `LoraModel`, or one with injected adapters, whose keys lack its prefix.
        state_dict: take the values from here, as `model.state_dict()` gives them, or this function.
        unwrap_compiled: as in PEFT's function; a compiled model is always unwrapped.
        save_embedding_layers: as in `save_pretrained`.

    Raises:
        InputError: there is no such adapter, or `state_dict` lacks a part of it.
    """
    bank, prefix = bank_of(model)
    bank.require(adapter_name)
    own = bank.adapter_tensors(adapter_name)
    own |= frozen_embeddings(bank.get_base_model(), own, save_embedding_layers)
    if state_dict is not None:
        own = values_in(bank if prefix else bank.get_base_model(), own, state_dict)
    elif hasattr(model, "module"):  # FSDP keeps the values elsewhere, and gives them like this
        own = values_in(bank if prefix else bank.get_base_model(), own, model.state_dict())
    return {prefix + key.removeprefix(PREFIX): tensor.detach() for key, tensor in own.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Puts tensors into an adapter of `model`; the inverse of `get_peft_model_state_dict`.

    Args:
        peft_model_state_dict: wrappers' parts (`module.`, `_orig_mod.`) in its names do not
            matter, nor does PEFT's prefix; a whole `state_dict()` of a model with one adapter will
            do.
        ignore_mismatched_sizes: leave out tensors of another shape, which are then missing.
        low_cpu_mem_usage: as in PEFT's function.

    Returns: the adapter's keys that got no value, and those given that it does not have.

    Raises:
        InputError: there is no such adapter, or a shape does not fit.
    """
    bank, prefix = bank_of(model)
    bank.require(adapter_name)
    own, base = bank.adapter_tensors(adapter_name), bank.get_base_model()
    given: Mapping[str, torch.Tensor] = peft_model_state_dict
    if not own.keys() <= given.keys():
        given = as_peft_names(given, bank.peft_config[adapter_name].bias, "peft_model_state_dict")
    given, frozen = split_frozen(base, given, own)
    if ignore_mismatched_sizes:
        given = {k: t for k, t in given.items() if k not in own or own[k].shape == t.shape}
        frozen = of_same_shape(base, frozen)
    both = own.keys() & given.keys()
    load_tensors({k: own[k] for k in both}, {k: given[k] for k in both}, adapter_name)
    put_frozen(base, frozen, adapter_name, alone=bank.adapters == [adapter_name])
    left_out = [[k for k in keys if k not in both] for keys in (own, given)]
    return LoadResult(*([prefix + k.removeprefix(PREFIX) for k in keys] for keys in left_out))


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every wrapped layer of a `LoraModel`, or of any module that holds some.

    Raises:
        InputError: there is none.
    """
    found = layer_status(model.base_model if isinstance(model, LoraModel) else model)
    if not found:
        raise InputError("No adapter layers found in the model")
    return found


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all layers of a `LoraModel`, or of any module that holds some, together.

    Raises:
        InputError: there is none.
    """
    get_layer_status(model)
    if isinstance(model, LoraModel):
        return model.get_model_status()
    return model_status(model, model, {}, count_parameters(model))


def get_base_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's own tensors, under the names that they have without adapters."""
    bank, _ = bank_of(model)
    base = bank.get_base_model()
    own = {id(tensor) for name in bank.adapters for tensor in bank.adapter_tensors(name).values()}
    found = {}
    for name, tensor in base.state_dict(keep_vars=True).items():
        if id(tensor) not in own and ".lora_initial." not in name:
            found[_name_in_base(name)] = tensor.detach()
    return found


def set_base_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], strict: bool = True
) -> LoadResult:
    """Puts tensors into the base of `model`; the inverse of `get_base_model_state_dict`.

    Raises:
        RuntimeError: with `strict`, as of `load_state_dict`: a key is missing or unexpected.
    """
    own = get_base_model_state_dict(model)
    missing = [name for name in own if name not in state_dict]
    unexpected = [name for name in state_dict if name not in own]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"Missing key(s) in state_dict: {missing}. Unexpected key(s): {unexpected}."
        )
    both = own.keys() & state_dict.keys()
    load_tensors({k: own[k] for k in both}, {k: state_dict[k] for k in both}, "state_dict")
    return LoadResult(missing, unexpected)


def _name_in_base(name: str) -> str:
    """A tensor's name without the wrappers around it."""
    parts = (part for part in name.split(".") if part not in ("base_layer", "original_module"))
    return ".".join(parts)


def bank_of(model: nn.Module) -> tuple[LoraModel, str]:
    """The adapters of `model`, compiled or distributed too, and what its keys start with.

    Raises:
        InputError: it has none.
    """
    inner: object = model
    while isinstance(
        inner, nn.Module
    ):  # a LoraModel first: it has the attributes of a compiled base too
        if isinstance(inner, LoraModel):
            return inner, PREFIX
        if (bank := vars(inner).get(_BANK)) is not None:
            return bank, ""
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    raise InputError("this model has no adapters: use get_peft_model first")


def _targets_of(config: LoraConfig, state_dict: Mapping[str, torch.Tensor]) -> LoraConfig:
    """`config` with the modules as targets to which the tensors belong."""
    if config.target_parameters:
        raise InputError(
            "target_parameters: which parameters an adapter has cannot be told from a state_dict"
        )
    keys = (without_prefixes(key).removeprefix(PREFIX) for key in state_dict)
    layers = [key.partition(".lora_") for key in keys]
    paths = dict.fromkeys(path for path, found, _ in layers if found)
    return dataclasses.replace(config, target_modules=list(paths))
