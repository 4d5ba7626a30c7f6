"""Names of an adapter's tensors as other programs save them, made PEFT's.

Wrappers around a model (DDP, FSDP, `torch.compile`) leave their own parts in every name, and a
plain `state_dict()` has the adapter's name in each, beside all weights of the base. Which module
of the model at hand a name means is `fitting.py`'s.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from lorakit.errors import InputError, listed

PREFIX = "base_model.model."
"""Before the path of a module in all of PEFT's names."""

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_DISTRIBUTED = "module."
_ADAPTER = re.compile(
    # Not by biases: with bias="all" PEFT saves lora_B.NAME.bias beside lora_B.weight.
    r".*\.lora_[AB]\.(?P<of_factor>[^.]+)\.weight"
    r"|.*\.(?:lora_embedding_[AB]|trainable_tokens_delta)\.(?P<of_tensor>[^.]+)"
    r"|.*\.lora_magnitude_vector\.(?P<of_length>(?!weight$)[^.]+)(?:\.weight)?"
)
_OWN = ("lora_", "trainable_tokens_delta")


def without_wrappers(name: str) -> str:
    """The path of a module or parameter without the parts that wrappers have put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


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
        return {_with_length(name): tensors[key] for name, key in plain.items()}
    (adapter,) = adapters
    # All weights of the model are beside the adapter's: they are the base's.
    found, left_out = {}, 0
    for name, key in plain.items():
        own = any(part in name for part in _OWN) or f".modules_to_save.{adapter}." in name
        if own or (bias != "none" and name.endswith(".bias")):
            short = name.replace(f".modules_to_save.{adapter}.", ".")
            short = short.replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
            found[_with_length(short)] = tensors[key]
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


def _with_length(name: str) -> str:
    """DoRA's magnitudes by the name that has no `weight` behind it."""
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name
