"""Adapters of models that have more tokens than their base: the base gets the rows.

Such an adapter holds the whole embedding and head, by `modules_to_save` or as PEFT saves those of
a resized model, or trains the row of each new token. Its tokenizer is `adapter_tokenizer.py`'s.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lorakit.adapters.adapter_files import AdapterFiles
from lorakit.adapters.adapter_tokenizer import load_tokenizer
from lorakit.errors import BASE_OPTION, InputError, listed
from lorakit.lora.checkpoint import PREFIX
from lorakit.lora.targets import tied_modules
from lorakit.lora.vocabulary import embeddings, rows_in_adapter, vocabulary_size
from lorakit.models.names import resolve


@torch.no_grad()
def add_rows(model: Any, adapter: AdapterFiles) -> int:
    """Gives the base `model` as many tokens as `adapter` is for, and says how many are new.

    Their rows are the mean of the others, for those who ask the base without the adapter.

    Args:
        model: not wrapped yet; it may be on the meta device.

    Raises:
        InputError: the adapter does not bring the new rows of both embedding and head.
    """
    before = vocabulary_size(model)
    ends = {
        path: rows_in_adapter(adapter.config, adapter.tensors, path, before)
        for path in embeddings(model)
    }
    rows = max(filter(None, ends.values()), default=0)
    if 0 < rows < before:
        _cut(model, adapter, rows, before)
    if rows <= before:
        return 0
    # The base's own weight is that of the modules tied to it too; one that is trained is not.
    frozen = {
        path for path in ends if ends[path] and f"{PREFIX}{path}.weight" not in adapter.tensors
    }
    lacking = [
        path
        for path, found in ends.items()
        if found != rows and not frozen.intersection(tied_modules(model, path))
    ]
    if lacking:
        raise InputError(
            f"{adapter.folder} is for {rows} tokens, {rows - before} more than "
            f"{adapter.base_model} has, and does not bring their rows of {listed(lacking)}: save "
            "it again where it was trained, with modules_to_save of embedding and head"
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
    for path in ends:
        weight = model.get_submodule(path).weight
        weight[before:] = weight[:before].mean(0, dtype=torch.float32).to(weight)
    return rows - before


def _cut(model: Any, adapter: AdapterFiles, rows: int, before: int) -> None:
    """Takes rows off the base that stand for no token, as the model had it that was trained."""
    tokens = len(load_tokenizer(resolve(adapter.base_model).path))
    if rows < tokens:
        raise InputError(
            f"{adapter.folder} is for a vocabulary of {rows} tokens, and {adapter.base_model} has "
            f"{tokens}: give the model whose vocabulary was cut ({BASE_OPTION})"
        )
    warnings.warn(
        f"{adapter.folder} is for {rows} rows of embeddings: the base's {before - rows} last rows, "
        "which belong to no token, are left out",
        stacklevel=3,
    )
    model.resize_token_embeddings(rows, mean_resizing=False)


def added_tokens_notice(added: int, adapter: AdapterFiles) -> str:
    """The notice on a merged model that has more tokens than its base."""
    return (
        f"{added} tokens are new: their embeddings are those of {adapter.folder}, and the model's "
        "vocab_size is larger than the base's"
    )
