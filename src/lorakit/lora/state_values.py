"""An adapter's values out of a state dictionary: the model's, or the adapter's own.

The model's `state_dict` is never called for its names: scripts of 2023 replaced it by a function
that asks for the adapter's, which would ask for it again without end.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import nn

from lorakit.errors import InputError, listed
from lorakit.lora.key_names import PREFIX, without_prefixes


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
