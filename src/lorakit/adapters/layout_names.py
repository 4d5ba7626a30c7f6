"""An adapter that PEFT trained on a foreign layout's own code, under transformers' names.

A module of that code that is several in transformers (a fused `query_key_value`) becomes as many
updates with one `A` and their own rows of `B`, which is the very same update; the inverse of
`export/chatglm.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lorakit.adapters.derived import base_of
from lorakit.commands import quoted
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.lora.checkpoint import PREFIX, load_tensors, read_adapter
from lorakit.lora.config import LoraConfig
from lorakit.lora.targets import written_targets
from lorakit.lora.vocabulary import put_frozen, split_frozen
from lorakit.models.layouts import LAYOUTS
from lorakit.models.layouts.module_names import ModuleNames
from lorakit.models.names import resolve
from lorakit.models.skeleton import skeleton

FACTORS_A = ("lora_A.weight", "lora_embedding_A")
"""How the keys of a module's A end."""

_UPDATE = {"lora_A.weight", "lora_B.weight"}


def own_names(tensors: Iterable[str]) -> ModuleNames | None:
    """The layout's names that an adapter's keys have, where they are those of its own code."""
    keys = list(tensors)
    for layout in LAYOUTS:
        names = layout.names
        if names and any(key.startswith(f"{PREFIX}{names.layers}.") for key in keys):
            return names
    return None


def refuse_own_names(folder: str | Path, tensors: Iterable[str]) -> None:
    """Raises InputError, with what to do, for an adapter on a layout's own code."""
    if names := own_names(tensors):
        raise InputError(
            f"{folder} is an adapter on {names.code}, whose modules have other names here: "
            f"lorakit import {quoted(folder)} -o DIR, and use DIR"
        )


def native_adapter(
    folder: Path, base: str | None = None
) -> tuple[str, LoraConfig, dict[str, torch.Tensor]]:
    """The adapter in `folder` as one on transformers' model with the same update of every weight.

    Args:
        base: the base model, in the original layout or converted; None is the recorded one.

    Returns: what it was trained with, its configuration, and its tensors under PEFT's keys.

    Raises:
        InputError: it is no adapter on a layout's own code or on another base, or no adapter on
            transformers' model does the same.
    """
    config, tensors = read_adapter(folder)
    if (names := own_names(tensors)) is None:
        raise InputError(
            f"{folder} is in PEFT's form already, which every command takes as it is: there is "
            "nothing to import"
        )
    _require_exact(folder, config)
    name = base_of(folder, config, base)
    model = skeleton(resolve(name).path)
    if type(model.config).__name__ != names.config:
        raise InputError(
            f"{folder} is an adapter on {names.code}, and {name} a model of the kind "
            f"{model.config.model_type}: give --base"
        )
    found, scalings = _renamed(folder, config, tensors, names, model)
    if not scalings:
        raise InputError(f"{folder} holds no pair of matrices A and B")
    native = _config(config, found, scalings, names, model)
    native.base_model_name_or_path = name
    native.revision = config.revision if base is None else None
    require_fit(folder, native, found, model)
    return names.tool or f"PEFT on {names.code}", native, found


def _require_exact(folder: Path, config: LoraConfig) -> None:
    """Raises InputError for what means something else beside a weight that is cut into three."""
    init = config.init
    of_weights = init.kind.subtracted or init.kind.changes_base
    why = [
        (of_weights, f"starts from the base's weights ({init.value})"),
        (bool(config.layer_replication), "replicates layers (layer_replication)"),
        (bool(config.target_parameters), "adapts parameters (target_parameters)"),
    ]
    if found := [what for present, what in why if present]:
        raise InputError(
            f"{folder} {found[0]}, which has no equal on transformers' model: merge it "
            "where it was trained"
        )


def _renamed(
    folder: Path,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    names: ModuleNames,
    model: nn.Module,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors under transformers' names, and every update's scaling by its module's path."""
    found: dict[str, torch.Tensor] = {}
    scalings: dict[str, float] = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    weights = {name.removesuffix(".weight"): one for name, one in model.named_parameters()}
    for key, tensor in tensors.items():
        try:
            path, modules, ending = names.native_modules(key.removeprefix(PREFIX))
        except KeyError as error:
            raise InputError(
                f"{folder}: {key} is not part of an adapter on {names.models}"
            ) from error
        if ending in FACTORS_A:
            scalings |= dict.fromkeys(modules, config.scaling_for(path))
        if len(modules) == 1:
            found[f"{PREFIX}{modules[0]}.{ending}"] = tensor
        else:
            joined.setdefault(path, {})[ending] = tensor
    for path, parts in joined.items():
        modules = names.native_modules(path)[1]
        rows = [len(weights[module]) for module in modules]
        for ending, tensor in parts.items():
            if ending != FACTORS_A[0] and tensor.shape[0] != sum(rows):
                raise InputError(
                    f"{folder}: {path}.{ending} has {tensor.shape[0]} rows, and the base's "
                    f"{sum(rows)}: it is for another base model"
                )
        start, silent = 0, []
        for module, count in zip(modules, rows, strict=True):
            own = {
                e: t if e == FACTORS_A[0] else t[start : start + count] for e, t in parts.items()
            }
            start += count
            if own.keys() == _UPDATE:
                own = _without_zeros(own)
                silent += [module] if not own["lora_B.weight"].any() else []
            found |= {f"{PREFIX}{module}.{ending}": tensor for ending, tensor in own.items()}
        for module in silent if len(silent) < len(modules) else []:
            scalings.pop(module)
            for ending in _UPDATE:
                del found[f"{PREFIX}{module}.{ending}"]
    return found, scalings


def _without_zeros(factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same update without the columns of B, and rows of A, that add nothing to it.

    An adapter that was written for the original code has them: its B is zero beside its diagonal.
    """
    A, B = factors["lora_A.weight"], factors["lora_B.weight"]
    used = B.any(dim=0)
    if A.shape[0] != B.shape[1] or not used.any():
        return factors
    return {"lora_A.weight": A[used], "lora_B.weight": B[:, used]}


def _config(
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    scalings: Mapping[str, float],
    names: ModuleNames,
    model: PreTrainedModel,
) -> LoraConfig:
    """The configuration that says of transformers' modules what `config` says of the original."""
    ranks = {
        path: tensors[next(k for e in FACTORS_A if (k := f"{PREFIX}{path}.{e}") in tensors)]
        .shape[0] for path in scalings
    }  # fmt: skip
    power = 0.5 if config.use_rslora else 1.0
    alphas = {path: _whole(scaling * ranks[path] ** power) for path, scaling in scalings.items()}
    saved, tokens = config.modules_to_save, config.trainable_token_indices
    renamed = names.native_names
    order = [name for name, _ in model.named_modules() if name in scalings]
    return config.with_ranks(
        ranks,
        alphas,
        target_modules=written_targets(order, model),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=saved and [native for name in saved for native in renamed(name)],
        trainable_token_indices={n: t for name, t in tokens.items() for n in renamed(name)}
        if isinstance(tokens, dict)
        else tokens,
        init_lora_weights=True,
        task_type="CAUSAL_LM",
    )


def _whole(alpha: float) -> float:
    """`alpha` without the rounding that a division and a product left."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def require_fit(
    folder: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
) -> None:
    """Raises InputError unless every key and shape has its place in the model (without weights)."""
    adapted = LoraModel(model, config, initialize=False, low_cpu_mem_usage=True)
    base, own = adapted.get_base_model(), adapted.adapter_tensors("default")
    kept, frozen = split_frozen(base, tensors, own)
    load_tensors(own, kept, folder)
    put_frozen(base, frozen, folder, alone=True)
