"""An adapter's module names, translated to those of the model that it is loaded into.

Models get other names over time and in other wrappings: a language model alone or inside one for
pictures, the body alone or with its head. Where every name of an adapter means one module of the
model, and no two the same, the adapter is read under the model's own names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.lora.architecture import language_part
from lorakit.lora.config import LoraConfig
from lorakit.lora.experts import stack_experts
from lorakit.lora.key_names import PREFIX
from lorakit.lora.targets import base_modules

Tensors = Mapping[str, torch.Tensor]

_ENDING = re.compile(
    r"(?P<path>.+?)\.(?P<ending>(?:base_layer\.)*(?:lora_[AB]\.\w+|lora_embedding_[AB]"
    r"|lora_magnitude_vector)|(?:token_adapter|base_layer)\..+|[^.]+)"
)


def fitted(
    model: nn.Module, config: LoraConfig, tensors: Tensors, initial: Tensors, folder: str | Path
) -> tuple[LoraConfig, Tensors, Tensors]:
    """The adapter in `folder` under the names that `model` has; as it is where they are the same.

    Experts that are adapted one by one get stacked where the model stacks them.

    Args:
        config, tensors, initial: as `read_adapter` and `read_initial` give them.

    Returns: the three, with `target_modules` and patterns by the model's names.
    """
    there = {name for name, _ in base_modules(model)}
    paths = {split_key(key)[0] for key in tensors if "lora_" in key}
    if paths <= there:
        return config, tensors, initial
    renamed = renamed_modules(model, {split_key(key)[0] for key in tensors}, there)
    if renamed:
        tensors = {_renamed(key, renamed): tensor for key, tensor in tensors.items()}
        initial = {
            f"{renamed.get(path, path)}.{factor}": tensor
            for path, _, factor, tensor in ((*k.rpartition("."), t) for k, t in initial.items())
        }
        config = _config(config, {p: renamed.get(p, p) for p in paths})
        one, other = next(iter(renamed.items()))
        warnings.warn(
            f"{folder}: {len(renamed)} modules have other names in this model ({one} is {other})",
            stacklevel=4,
        )
    stacked = stack_experts(model, config, tensors, folder)
    return (*stacked, initial) if stacked else (config, tensors, initial)


def split_key(key: str) -> tuple[str, str]:
    """A module's path in the model, and the rest of the key of one of its tensors."""
    match = _ENDING.fullmatch(key.removeprefix(PREFIX))
    return (match["path"], match["ending"]) if match else (key.removeprefix(PREFIX), "")


def renamed_modules(
    model: nn.Module, paths: Iterable[str], there: Collection[str] | None = None
) -> dict[str, str]:
    """The model's own names of those of `paths` that it does not have.

    Args:
        there: the paths that it has.

    Returns: nothing where one has no name, or two have the same.
    """
    there = {name for name, _ in base_modules(model)} if there is None else there
    paths = set(paths)
    unknown = sorted(paths.difference(there))
    meant = _by_transformers(model, unknown, there)
    missing = [path for path in unknown if path not in meant]
    meant |= _by_ending(model, missing, there)
    if len(meant) < len(unknown):
        experts = [path for path in unknown if path not in meant]
        parents = {path: _expert_parent(path) for path in experts}
        known = {p for p in parents.values() if p} & set(there)
        others = {p for p in parents.values() if p} - known
        lists = _by_transformers(model, sorted(others), there)
        lists |= _by_ending(model, [p for p in others if p not in lists], there)
        for path, parent in parents.items():
            if parent and (parent in known or parent in lists):
                meant[path] = lists.get(parent, parent) + path[len(parent) :]
    names = [*meant.values(), *(path for path in paths if path in there)]
    if len(meant) < len(unknown) or len(set(names)) < len(names):
        return {}
    return {old: new for old, new in meant.items() if old != new}


def _expert_parent(path: str) -> str | None:
    """`…mlp.experts` of `…mlp.experts.3.up_proj`, and of `…mlp.experts.down_projs.3`."""
    match = re.fullmatch(r"(.+\.experts)\.(?:\d+\.\w+|\w+\.\d+)", path)
    return match[1] if match else None


def _by_transformers(
    model: nn.Module, paths: Iterable[str], there: Collection[str]
) -> dict[str, str]:
    """The names to which transformers maps older ones when it loads the model's weights."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    if not isinstance(model, PreTrainedModel):
        return {}
    renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    own: Any = dict.fromkeys(f"{name}.weight" for name in there)
    found = {}
    for path in paths:
        name, _ = rename_source_key(f"{path}.weight", renamings, [], model.base_model_prefix, own)
        if name.removesuffix(".weight") in there:
            found[path] = name.removesuffix(".weight")
    return found


def _by_ending(model: nn.Module, paths: Iterable[str], there: Collection[str]) -> dict[str, str]:
    """The one module that has the same place in a list of layers, or is the only one of its name.

    Where several are, as a model for pictures has layers in both parts, it is the language part's.
    """
    ends: dict[str, list[str]] = {}
    for name in there:
        ends.setdefault(_place(name), []).append(name)
    part = language_part(model)
    found = {}
    for path in paths:
        meant = ends.get(_place(path), [])
        if len(meant) > 1 and part is not None and not _names_another_part(path):
            meant = [name for name in meant if name.startswith(f"{part}.")]
        if len(meant) == 1:
            found[path] = meant[0]
    return found


def _place(path: str) -> str:
    """`layers.3.self_attn.q_proj` of a module in a list of layers, the last part of any other."""
    parts = path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal() and i), len(parts))
    return ".".join(parts[first - 1 :])


def _names_another_part(path: str) -> bool:
    return any(word in path.lower() for word in ("vis", "audio", "image", "encoder", "projector"))


def _renamed(key: str, renamed: Mapping[str, str]) -> str:
    path, ending = split_key(key)
    return f"{PREFIX}{renamed.get(path, path)}.{ending}" if ending else key


def _config(config: LoraConfig, paths: Mapping[str, str]) -> LoraConfig:
    """The configuration for modules by their new names, each by its whole path.

    Args:
        paths: of adapted modules, the new by the old.
    """
    return config.with_ranks(
        {new: config.rank_for(old) for old, new in paths.items()},
        {new: config.alpha_for(old) for old, new in paths.items()},
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=sorted(paths.values()),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
