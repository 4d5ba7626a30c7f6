"""An adapter that PEFT trained on ChatGLM's original code, under the names of transformers' GLM.

The one layer `query_key_value` of that code is three in transformers. Their updates share `A`, and
each has its own rows of `B`, which is the very same update; the inverse of `export/chatglm.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import GlmConfig, PreTrainedModel

from lorakit.adapters.rank_patterns import usual_and_others
from lorakit.commands import quoted
from lorakit.errors import InputError
from lorakit.lora import LoraModel
from lorakit.lora.checkpoint import PREFIX, load_tensors, read_adapter
from lorakit.lora.config import LoraConfig
from lorakit.lora.targets import written_targets
from lorakit.lora.vocabulary import put_frozen, split_frozen
from lorakit.models.layouts.chatglm.layout import LAYERS, native_modules, native_names, qkv_rows
from lorakit.models.names import resolve
from lorakit.models.skeleton import skeleton

FACTORS_A = ("lora_A.weight", "lora_embedding_A")
"""How the keys of a module's A end."""

_UPDATE = {"lora_A.weight", "lora_B.weight"}


def has_original_names(tensors: Iterable[str]) -> bool:
    """Whether an adapter's keys are those of ChatGLM's original code."""
    return any(key.startswith(f"{PREFIX}{LAYERS}.") for key in tensors)


def refuse_original_names(folder: str | Path, tensors: Iterable[str]) -> None:
    """Raises InputError, with what to do, for an adapter on ChatGLM's original code."""
    if has_original_names(tensors):
        raise InputError(
            f"{folder} is an adapter on ChatGLM's original code, whose modules have other names "
            f"here: lorakit import {quoted(folder)} -o DIR, and use DIR"
        )


def native_adapter(
    folder: Path, base: str | None = None
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The adapter in `folder` as one on transformers' GLM with the same update of every weight.

    Args:
        base: the base model, in the original layout or converted; None is the recorded one.

    Returns: its configuration, and its tensors under PEFT's keys.

    Raises:
        InputError: it is no adapter on ChatGLM's original code or on another base, or no adapter
            on GLM does the same.
    """
    config, tensors = read_adapter(folder)
    if not has_original_names(tensors):
        raise InputError(
            f"{folder} is in PEFT's form already, which every command takes as it is: there is "
            "nothing to import"
        )
    _require_exact(folder, config)
    name = base or config.base_model_name_or_path
    if not name:
        raise InputError(f"{folder} does not say which base model it is for: give --base")
    model = skeleton(resolve(name).path)
    if not isinstance(model.config, GlmConfig):
        raise InputError(
            f"{folder} is an adapter on ChatGLM's original code, and {name} a model of the kind "
            f"{model.config.model_type}: give --base"
        )
    found, scalings = _renamed(folder, config, tensors, qkv_rows(model.config))
    if not scalings:
        raise InputError(f"{folder} holds no pair of matrices A and B")
    native = _config(config, found, scalings, model)
    native.base_model_name_or_path = name
    native.revision = config.revision if base is None else None
    _require_fit(folder, native, found, model)
    return native, found


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
            f"{folder} {found[0]}, which has no equal on transformers' GLM: merge it where it was "
            "trained"
        )


def _renamed(
    folder: Path, config: LoraConfig, tensors: Mapping[str, torch.Tensor], rows: tuple[int, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors under transformers' names, and the scaling of every update by its module's path.

    Args:
        rows: how many rows of `query_key_value` are queries, keys and values.
    """
    found: dict[str, torch.Tensor] = {}
    scalings: dict[str, float] = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        try:
            path, modules, ending = native_modules(key.removeprefix(PREFIX))
        except KeyError as error:
            raise InputError(
                f"{folder}: {key} is no part of an adapter on ChatGLM2, ChatGLM3 or GLM-4"
            ) from error
        if ending in FACTORS_A:
            scalings |= dict.fromkeys(modules, config.scaling_for(path))
        if len(modules) == 1:
            found[f"{PREFIX}{modules[0]}.{ending}"] = tensor
        else:
            joined.setdefault(path, {})[ending] = tensor
    for path, parts in joined.items():
        for ending, tensor in parts.items():
            if ending != FACTORS_A[0] and tensor.shape[0] != sum(rows):
                raise InputError(
                    f"{folder}: {path}.{ending} has {tensor.shape[0]} rows, and the base's "
                    f"{sum(rows)}: it is for another base model"
                )
        modules = native_modules(path)[1]
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
    model: PreTrainedModel,
) -> LoraConfig:
    """The configuration that says of transformers' modules what `config` says of the original."""
    ranks = {
        path: tensors[next(k for e in FACTORS_A if (k := f"{PREFIX}{path}.{e}") in tensors)]
        .shape[0] for path in scalings
    }  # fmt: skip
    power = 0.5 if config.use_rslora else 1.0
    r, other_ranks = usual_and_others(ranks)
    alpha, other_alphas = usual_and_others(
        {path: _whole(scaling * ranks[path] ** power) for path, scaling in scalings.items()}
    )
    saved, tokens = config.modules_to_save, config.trainable_token_indices
    order = [name for name, _ in model.named_modules() if name in scalings]
    return dataclasses.replace(
        config,
        r=int(r),
        lora_alpha=alpha,
        rank_pattern={name: int(rank) for name, rank in other_ranks.items()},
        alpha_pattern=other_alphas,
        target_modules=written_targets(order, model),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=saved and [native for name in saved for native in native_names(name)],
        trainable_token_indices={n: t for name, t in tokens.items() for n in native_names(name)}
        if isinstance(tokens, dict)
        else tokens,
        init_lora_weights=True,
        task_type="CAUSAL_LM",
    )


def _whole(alpha: float) -> float:
    """`alpha` without the rounding that a division and a product left."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * alpha else alpha


def _require_fit(
    folder: Path, config: LoraConfig, tensors: dict[str, torch.Tensor], model: PreTrainedModel
) -> None:
    """Puts the adapter on the model without weights, where every key and shape must have its place.

    Raises:
        InputError: one has not.
    """
    adapted = LoraModel(model, config, initialize=False, low_cpu_mem_usage=True)
    base, own = adapted.get_base_model(), adapted.adapter_tensors("default")
    kept, frozen = split_frozen(base, tensors, own)
    load_tensors(own, kept, folder)
    put_frozen(base, frozen, folder, alone=True)
