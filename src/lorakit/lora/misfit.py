"""Why an adapter's tensors do not fit a model, by kind, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorakit.errors import BASE_OPTION, listed

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by the keys that PEFT's files have."""

_CURE = f"give the model that it was trained on ({BASE_OPTION})"
_ANOTHER = "is an adapter for another base model"


def misfit(own: Shapes, theirs: Shapes) -> str:
    """What is wrong with an adapter, as the rest of a sentence that begins with its folder.

    Args:
        own: what the model with the adapter's configuration needs.
        theirs: what the file has.

    Returns: nothing where all keys and shapes are the same.
    """
    for key in sorted(own.keys() & theirs.keys()):
        if own[key] != theirs[key]:
            return _wrong_shape(key, own[key], theirs[key], own)
    extra, lacking = sorted(theirs.keys() - own.keys()), sorted(own.keys() - theirs.keys())
    if extra:
        return _unknown(extra, own)
    if lacking:
        return (
            f"lacks {listed(lacking, 3)}, which its adapter_config.json says that it has: it is "
            f"incomplete, or its configuration is of another adapter, or it {_ANOTHER}: {_CURE}"
        )
    return ""


def _wrong_shape(key: str, own: tuple[int, ...], its: tuple[int, ...], all_own: Shapes) -> str:
    shapes = f"{key} has shape {its}, and this model needs {own}"
    if its == own[::-1]:
        return (
            f"holds transposed factors: {shapes}: A must be (r, d_in) and B (d_out, r) (lorakit "
            "import reads mlx-lm's)"
        )
    rank = 0 if key.endswith(("lora_A.weight", "lora_embedding_A")) else 1
    if "lora_" in key and len(own) == len(its) == 2 and own[1 - rank] == its[1 - rank]:
        return (
            f"has other ranks than its configuration says: {shapes} (rank {its[rank]}, not "
            f"{own[rank]}): correct r or rank_pattern in adapter_config.json"
        )
    if re.search(r"lora_embedding_A$|(embed\w*|wte|lm_head|score)\.\w*\.?weight$", key):
        rows = (its[1], own[1]) if key.endswith("lora_embedding_A") else (its[0], own[0])
        if rows[0] != rows[1]:
            return (
                f"{_ANOTHER}, with {rows[0]} tokens where this one has {rows[1]}: {shapes}: {_CURE}"
            )
    return f"{_ANOTHER}, of another width: {shapes}: {_CURE}"


def _unknown(extra: list[str], own: Shapes) -> str:
    layers, mine = _layers(extra), _layers(own)
    if layers and mine and max(layers) > max(mine):
        return (
            f"{_ANOTHER}, with at least {max(layers) + 1} layers where this one has "
            f"{max(mine) + 1}: it has {listed(extra, 3)}: {_CURE}"
        )
    return (
        f"{_ANOTHER}: it has, and this model does not, {listed(extra, 3)}: another "
        f"architecture, or other targets: {_CURE}"
    )


def _layers(keys: Mapping[str, object] | list[str]) -> set[int]:
    """The numbers of the layers in which tensors stand: the first number in each key."""
    return {int(found[1]) for key in keys if (found := re.search(r"\.(\d+)\.", key))}
