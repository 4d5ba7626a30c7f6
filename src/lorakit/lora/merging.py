"""Adding adapters to the base weights of a whole model, all of it or none.

One layer's merge is in `layers/wrapped.py`.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.lora.layers import Mergeable, ModulesToSaveWrapper
from lorakit.lora.wrapping import eject, wrapped_modules


def merge_layers(model: nn.Module, names: Sequence[str] | None, safe_merge: bool) -> None:
    """Merges `names` (None: the active ones) into every layer of `model`.

    Raises:
        InputError: with `safe_merge`, when a merged weight has NaN or Inf. No layer is changed.
    """
    layers = [m for _, m in wrapped_modules(model) if isinstance(m, Mergeable)]
    wanted = [layer.active_adapters if names is None else names for layer in layers]
    if any(wanted) and all(
        set(own) & set(layer.adapters) <= set(layer.merged_adapters)
        for own, layer in zip(wanted, layers, strict=True)
    ):
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
        return
    before = [list(layer.merged_adapters) for layer in layers]
    try:
        for layer in layers:
            layer.merge(names, safe_merge=safe_merge)
    except InputError:
        for layer, merged in zip(layers, before, strict=True):
            layer.unmerge()
            layer.merge(merged)
        raise


def merge_and_eject(model: nn.Module, names: Sequence[str], safe_merge: bool) -> nn.Module:
    """`model` without wrapped modules, with `names` in its weights and in its saved modules.

    Raises:
        InputError: as above, or two adapters have their own copy of one module.
    """
    wrapped = [module for _, module in wrapped_modules(model)]
    for module in wrapped:
        if isinstance(module, ModulesToSaveWrapper):
            module.chosen(names)  # refuses two before anything is merged
    if safe_merge:
        merge_layers(model, names, safe_merge)
    for module in wrapped:
        if isinstance(module, Mergeable):
            module.merge(names, keep_backup=False)  # nothing is left to do after a safe merge
    eject(model, tuple(names))
    _tell_untied(model)
    return model


def as_before(model: nn.Module, trainable: Iterable[str]) -> nn.Module:
    """A plain model, with those parameters trainable that were before any adapter."""
    before = set(trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before)
    return model


def _tell_untied(model: nn.Module) -> None:
    """Records in the model's configuration that its embedding and head have come to differ.

    Otherwise a saved model would have one in the place of the other when it is loaded.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if head is None or embedding.weight is head.weight:
        return
    if torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
    else:
        warnings.warn(
            "Setting tie_word_embeddings=False in the model's config: the adapter has made its "
            "embedding and its head differ",
            stacklevel=4,
        )
        config.tie_word_embeddings = False
