"""Names of an adapter's tensors as other programs save them, made PEFT's.

Wrappers around a model (DDP, FSDP, `torch.compile`) leave their own parts in every name, and a
plain `state_dict()` has the adapter's name in each, beside all weights of the base. `fitting.py`
finds the module of a model that a name means.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.architecture import without_wrappers

Value = TypeVar("Value")

PREFIX = "base_model.model."
"""Before the path of a module in all of PEFT's names."""

_DISTRIBUTED = "module."
_ADAPTER = re.compile(
    # Not by biases: with bias="all" PEFT saves lora_B.NAME.bias beside lora_B.weight.
    r".*\.lora_[AB]\.(?P<of_factor>[^.]+)\.weight"
    r"|.*\.(?:lora_embedding_[AB]|trainable_tokens_delta)\.(?P<of_tensor>[^.]+)"
    r"|.*\.lora_magnitude_vector\.(?P<of_magnitude>(?!weight$)[^.]+)(?:\.weight)?"
)
_OWN = ("lora_", "trainable_tokens_delta")


def without_prefixes(key: str) -> str:
    """A tensor's name without the parts of wrappers, around the whole model too."""
    name = without_wrappers(key)
    while name.startswith(_DISTRIBUTED):
        name = name.removeprefix(_DISTRIBUTED)
    inside = PREFIX + _DISTRIBUTED
    return PREFIX + name.removeprefix(inside) if name.startswith(inside) else name


def as_peft_names(
    tensors: Mapping[str, torch.Tensor], bias: str, folder: str | Path
) -> dict[str, torch.Tensor]:
    """`tensors` by the names that PEFT's files have.

    Args:
        bias: `LoraConfig.bias`; trained biases belong to the adapter too.
        folder: of the adapter, for messages.

    Raises:
        InputError: they are several adapters', or two of them get one name.
    """
    plain = _without_prefixes(tensors)
    if len(plain) < len(tensors):
        twice = sorted(tensors.keys() - set(plain.values()))
        raise InputError(f"{folder} holds two tensors that mean the same: {listed(twice, 3)}")
    adapters = {
        next(filter(None, match.groups())) for match in map(_ADAPTER.fullmatch, plain) if match
    }
    if len(adapters) > 1:
        raise InputError(
            f"{folder} holds {len(adapters)} adapters in one file ({listed(sorted(adapters))}): "
            "save each alone, as save_pretrained does"
        )
    if not adapters:
        return {_magnitude_name(name): tensors[key] for name, key in plain.items()}
    (adapter,) = adapters
    # All weights of the model are beside the adapter's: they are the base's.
    found, left_out = {}, 0
    for name, key in plain.items():
        own = any(part in name for part in _OWN) or f".modules_to_save.{adapter}." in name
        if own or (bias != "none" and name.endswith(".bias")):
            short = name.replace(f".modules_to_save.{adapter}.", ".")
            short = short.replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
            found[_magnitude_name(short)] = tensors[key]
        else:
            left_out += 1
    if left_out:
        warnings.warn(
            f"{folder}: {left_out} tensors of the base model are left out: the file is a whole "
            "state_dict, of which the adapter is a part",
            stacklevel=4,
        )
    return found


def _without_prefixes(keys: Iterable[str]) -> dict[str, str]:
    """The keys by their names without wrappers; PEFT's prefix is added where none has it."""
    names = {without_prefixes(key): key for key in keys}
    if not any(name.startswith(PREFIX) for name in names):
        names = {PREFIX + name: key for name, key in names.items()}
    return names


def _magnitude_name(name: str) -> str:
    """DoRA's magnitudes by the name that has no `weight` behind it."""
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def values_in(
    model: nn.Module, own: Mapping[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The values in `state_dict` of an adapter's tensors, under the keys of `own`.

    Args:
        model: holds the tensors `own`; `state_dict` has its names, or the keys of `own` (with or
            without PEFT's prefix) where somebody has taken the adapter's part of it already.

    Returns: nothing for a `state_dict` without a tensor, which other processes than the first get.

    Raises:
        InputError: it lacks some.
    """
    # The model's `state_dict` is never called for its names: scripts of 2023 replaced it by a
    # function that asks for the adapter's, which would ask for it again without end.
    if not state_dict:
        return {}
    everything = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    names = {id(tensor): name for name, tensor in everything}
    plain = {without_prefixes(name): name for name in state_dict}
    found: dict[str, torch.Tensor] = {}
    for key, tensor in own.items():
        name = names.get(id(tensor), key)
        candidates = (name, key, key.removeprefix(PREFIX))
        wrapped = [plain.get(without_prefixes(candidate), "") for candidate in candidates]
        there = [candidate for candidate in (*candidates, *wrapped) if candidate in state_dict]
        if there:
            found[key] = state_dict[there[0]]
    if missing := own.keys() - found.keys():
        raise InputError(
            f"state_dict lacks {listed(sorted(missing), 3)}: give the model's whole state_dict(), "
            "or the adapter's"
        )
    return found


def renamed(
    tensors: Mapping[str, Value], key_mapping: Mapping[str, str] | None, prefix: str
) -> dict[str, Value]:
    """The tensors of a file under other keys: of each, what the first matching expression makes.

    Args:
        key_mapping: replacements by expression, of keys without `prefix`, as PEFT has them.

    Raises:
        InputError: two keys become one.
    """
    found: dict[str, Value] = {}
    for key, tensor in tensors.items():
        plain = key.removeprefix(prefix)
        for expression, replacement in (key_mapping or {}).items():
            changed, count = re.subn(expression, replacement, plain)
            if count:
                key = key[: len(key) - len(plain)] + changed
                break
        if key in found:
            raise InputError(f"key_mapping gives two tensors the key {key}")
        found[key] = tensor
    return found
