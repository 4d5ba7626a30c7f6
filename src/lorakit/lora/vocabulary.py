"""The embedding and the head in an adapter's file: how many tokens they are for, and whose.

Where a model got more tokens before it got its adapter, PEFT saves its embedding and its head with
the adapter (`save_embedding_layers`), under other names for each kind of wrapped module. They are
the base's own: here they are told apart from the adapter's tensors, and put into the base; and
they are found for an adapter that is saved.
"""

import json
import warnings
from collections.abc import Container, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.architecture import input_embedding, output_head
from lorakit.lora.checkpoint import PREFIX, require_finite, same_values, spread_like
from lorakit.lora.config import LoraConfig
from lorakit.lora.layers import TiedModule, TrainedTokens, unwrapped
from lorakit.lora.targets import base_modules

CONFIG = "config.json"
_PLACES = ("", "base_layer.", "token_adapter.base_layer.")

Frozen = dict[tuple[str, str], torch.Tensor]
"""Weights of the base by the path of their module and their name in it."""


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """The embedding that reads tokens and the head that writes them, if any, by their paths."""
    ends = [end for end in (input_embedding(model), output_head(model)) if end is not None]
    return {path: m for path, m in base_modules(model) if any(m is end for end in ends)}


def vocabulary_size(model: nn.Module) -> int:
    """For how many tokens the model has embeddings; 0 where it does not say."""
    embedding = input_embedding(model)
    return 0 if embedding is None else len(unwrapped(embedding).weight)


def rows_in_file(tensors: Mapping[str, torch.Tensor], path: str) -> int | None:
    """For how many tokens the file has rows of the embedding or head at `path`; None for none."""
    for place in _PLACES:
        if (weight := tensors.get(f"{PREFIX}{path}.{place}weight")) is not None:
            return weight.shape[0]
    return None


def rows_in_adapter(
    config: LoraConfig, tensors: Mapping[str, torch.Tensor], path: str, before: int
) -> int | None:
    """For how many tokens the adapter is, by its embedding or head at `path`; None for no others.

    Where the file holds no whole weight, trained rows of tokens that follow the base's say so.

    Args:
        before: how many tokens the base has.
    """
    if (rows := rows_in_file(tensors, path)) is not None:
        return rows
    if f"{PREFIX}{path}.token_adapter.trainable_tokens_delta" not in tensors:
        return None
    chosen = config.trainable_token_indices or []
    if isinstance(chosen, dict):
        named = (n for name, n in chosen.items() if f".{path}".endswith(f".{name}"))
        chosen = next(named, [])
    rows = max(chosen, default=-1) + 1
    return rows if rows > before and set(range(before, rows)) <= {*chosen} else None


def trains_new_rows(model: nn.Module, name: str) -> bool:
    """Whether adapter `name` trains every row that the model has beyond those of its base's files.

    Args:
        model: the wrapped model.
    """
    before = _stored_vocabulary(getattr(model, "config", None))
    if before is None:
        return False
    new = set(range(before, vocabulary_size(model)))
    for module in embeddings(model).values():
        layer = module.embedding if isinstance(module, TiedModule) else module
        trained = layer.token_indices.get(name, []) if isinstance(layer, TrainedTokens) else []
        if not new <= {*trained}:
            return False
    return True


def require_vocabulary(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: str | Path
) -> None:
    """Raises InputError for an adapter in `folder` that is for more tokens than `model` has."""
    for path, module in embeddings(model).items():
        rows = rows_in_file(tensors, path)
        own = 0 if rows is None else len(unwrapped(module).weight)  # 0 too where ZeRO-3 has it
        if rows is not None and rows > own > 0:
            raise InputError(
                f"{folder} is an adapter for a model with {rows} tokens ({path}), and this one has "
                f"{own}: call model.resize_token_embeddings({rows}) before loading it"
            )


def frozen_embeddings(
    model: nn.Module, own: Container[str], wish: str | bool
) -> dict[str, torch.Tensor]:
    """The embedding and the head as they are saved with an adapter, under PEFT's keys.

    Args:
        model: the wrapped model.
        own: the keys of the adapter's own tensors, which are in its file anyhow.
        wish: `save_embedding_layers`; `"auto"` saves them, with a warning, where the model has
            another number of tokens than the configuration in its base's files.
    """
    if wish == "auto":
        before = _stored_vocabulary(getattr(model, "config", None))
        wish = before is not None and before != vocabulary_size(model)
        if wish:
            message = f"the base had {before} tokens and has {vocabulary_size(model)} now: its "
            warnings.warn(f"{message}embeddings are saved with the adapter", stacklevel=4)
    found: dict[str, torch.Tensor] = {}
    for path, module in embeddings(model).items() if wish else ():
        if any(f"{PREFIX}{path}.{name}" in own for name in ("weight", "bias")):
            continue
        place = "" if unwrapped(module) is module else "base_layer."
        if f"{PREFIX}{path}.token_adapter.trainable_tokens_delta" in own:
            place = "token_adapter.base_layer."
        for name, tensor in unwrapped(module).named_parameters(recurse=False):
            found[f"{PREFIX}{path}.{place}{name}"] = tensor
    return found


def _stored_vocabulary(config: Any) -> int | None:
    """How many tokens the base's own configuration says, as far as it is on this machine."""
    name = str(getattr(config, "_name_or_path", "") or "")
    path = Path(name) / CONFIG if name else None
    if path is None or not path.is_file():
        try:
            cached = try_to_load_from_cache(name, CONFIG) if name else None
        except HFValidationError:
            return None
        path = Path(cached) if isinstance(cached, str) else None
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path else {}
        size = values.get("vocab_size", (values.get("text_config") or {}).get("vocab_size"))
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def split_frozen(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], own: Container[str]
) -> tuple[dict[str, torch.Tensor], Frozen]:
    """`tensors` without the weights of the base, and these.

    Args:
        model: the wrapped model.
        own: the keys of the adapter's own tensors.
    """
    kept, frozen = dict(tensors), {}
    for path, module in embeddings(model).items():
        for place, name in product(_PLACES, ("weight", "bias")):
            key = f"{PREFIX}{path}.{place}{name}"
            if key in kept and key not in own:
                frozen[path, name] = kept.pop(key)
        if isinstance(module, TiedModule):  # PEFT writes the embedding's rows here once more
            kept.pop(f"{PREFIX}{path}.token_adapter.trainable_tokens_delta", None)
    return kept, frozen


def of_same_shape(model: nn.Module, frozen: Frozen) -> Frozen:
    """Those of `frozen` that have the shape of the model's own."""
    return {
        (path, name): copied
        for (path, name), copied in frozen.items()
        if copied.shape == getattr(unwrapped(model.get_submodule(path)), name).shape
    }


@torch.no_grad()
def put_frozen(model: nn.Module, frozen: Frozen, folder: str | Path, *, alone: bool) -> None:
    """Puts weights of the base that an adapter brings into `model`, as PEFT does.

    Of a model on the meta device those that a layer adapts are left out. A module of one's own,
    without the configuration by which bases are told apart, takes others' weights with a warning.

    Args:
        alone: whether no other adapter is there, so that the base's weights may change.

    Raises:
        InputError: they are another base's, or would change what other adapters have; nothing is
            changed.
    """
    new = []
    for (path, name), copied in frozen.items():
        module = model.get_submodule(path)
        own, what = getattr(unwrapped(module), name), f"{folder} brings its own {path} {name}"
        if copied.shape != own.shape:
            raise InputError(
                f"{what}, of shape {tuple(copied.shape)}, and this model's is {tuple(own.shape)}: "
                "it is an adapter for another base model"
            )
        if not own.is_meta and same_values(copied, own):
            continue
        if own.is_meta and module is not unwrapped(module):
            continue
        if not alone:
            raise InputError(f"{what}, which other adapters do not have: load it before them")
        if not own.is_meta and getattr(model, "config", None) is not None:
            require_same_base(copied[:1], own[:1], what)
        elif not own.is_meta:
            warnings.warn(f"{what}, which replaces this model's", stacklevel=4)
        new.append((own, copied))
    require_finite({f"{path}.{name}": copied for (path, name), copied in frozen.items()}, folder)
    for own, copied in new:
        if own.is_meta:
            loaded = nn.Parameter(copied.to(own.dtype, copy=True), requires_grad=False)
            torch.utils.swap_tensors(own, loaded)
        else:
            own.copy_(spread_like(own, copied))


def require_same_base(copied: torch.Tensor, own: torch.Tensor, what: str) -> None:
    """Raises InputError unless the first rows of a copy and of the base's weight are the same.

    Tokens are added behind the others, so that only the last rows of a resized weight are new.
    """
    if not same_values(copied, own):
        raise InputError(
            f"{what}, which differs from the base's in its first row: it is an adapter for another "
            "base model"
        )
