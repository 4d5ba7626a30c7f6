"""Adapters of models that have more tokens than their base.

Such an adapter holds the whole embedding and head (`modules_to_save`, or as PEFT saves a resized
model's), and its folder the tokenizer. Here the base gets the rows, and the tokenizer is found.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.errors import InputError, listed
from lorakit.lora.checkpoint import PREFIX
from lorakit.lora.targets import tied_modules
from lorakit.lora.vocabulary import embeddings, rows_in_file

if TYPE_CHECKING:
    from lorakit.adapters.open import AdapterFiles

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""What a tokenizer's `save_pretrained` writes, whatever its kind, beside a chat template."""


@torch.no_grad()
def add_rows(model: Any, adapter: AdapterFiles) -> int:
    """Gives the base `model` as many tokens as `adapter` is for, and says how many are new.

    Their rows are the mean of the others, as far as the base is asked without the adapter.

    Args:
        model: not wrapped yet; it may be on the meta device.

    Raises:
        InputError: the adapter does not bring the new rows of the embedding and of the head.
    """
    embedding = model.get_input_embeddings()
    ends = {path: rows_in_file(adapter.tensors, path) for path in embeddings(model)}
    rows, before = max(filter(None, ends.values()), default=0), len(embedding.weight)
    if rows <= before:
        return 0
    # A frozen embedding is the head that is tied to it; of one that is trained the head has none.
    frozen = {
        path for path in ends if f"{PREFIX}{path}.weight" not in adapter.tensors and ends[path]
    }
    lacking = [
        path
        for path, found in ends.items()
        if found != rows and not frozen & {*tied_modules(model, path)}
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


def said_added(added: int, adapter: AdapterFiles) -> str:
    """What is said of a merged model that has more tokens than its base."""
    return (
        f"{added} tokens are new: their embeddings are those of {adapter.folder}, and the model's "
        "vocab_size is larger than the base's"
    )


def own_tokenizer(folder: Path, base: Any, rows: int) -> Any:
    """The tokenizer in an adapter's folder, where it has tokens that the base's has not; else None.

    Args:
        base: the base's tokenizer.
        rows: for how many tokens the model with the adapter has embeddings.

    Raises:
        InputError: it cannot be read.
    """
    if not has_tokenizer(folder):
        return None
    own = load_tokenizer(folder)
    vocabulary = own.get_vocab()
    added = vocabulary.keys() - base.get_vocab().keys()
    if not added:
        return None
    if beyond := [token for token in added if vocabulary[token] >= rows]:
        message = (
            f"the tokenizer in {folder} has tokens that the model has no embeddings for "
            f"({listed(sorted(beyond), 3)}): that of the base is used"
        )
        warnings.warn(message, stacklevel=3)
        return None
    if own.pad_token_id is None:
        own.pad_token = own.eos_token
    return own


def has_tokenizer(folder: Path) -> bool:
    """Whether there are a tokenizer's files in `folder`."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the tokenizer in {folder} is missing or damaged: copy or save it again"
        ) from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def common_tokenizer(folders: Sequence[Path], notices: list[str]) -> Path | None:
    """The first of adapters' folders that has a tokenizer; a notice where another has another."""
    found = {
        folder: [(folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()]
        for folder in folders
        if has_tokenizer(folder)
    }
    if not found:
        return None
    first, *others = found
    if any(found[other] != found[first] for other in others):
        notices.append(f"the adapters have different tokenizers: that of {first} is carried along")
    return first


def tokenizer_to_keep(base: Path, tuned: Path, rows: int, grown: bool) -> Path | None:
    """The folder `tuned`, where its tokenizer has tokens that that of its base has not.

    Args:
        base, tuned: models' folders; where either has no tokenizer there is nothing to compare.
        rows: for how many tokens the tuned model has embeddings.
        grown: whether these are more than the base's, so that it must say what they are.

    Raises:
        InputError: the tokenizers number the same tokens differently, or there are more tokens
            than rows.
    """
    if not grown and not (has_tokenizer(base) and has_tokenizer(tuned)):
        return None
    known, found = (load_tokenizer(folder).get_vocab() for folder in (base, tuned))
    added = {token: number for token, number in found.items() if token not in known}
    if moved := [token for token in known if found.get(token, known[token]) != known[token]]:
        raise InputError(
            f"the tokenizer of {tuned} numbers {len(moved)} tokens otherwise than that of {base} "
            f"({listed(map(repr, moved), 3)}): tokens can only be added behind the others"
        )
    if (last := max(added.values(), default=0)) >= rows:
        raise InputError(
            f"the tokenizer of {tuned} has tokens up to the number {last}, and the model has "
            f"embeddings for {rows}: give it the rows (model.resize_token_embeddings), and save it"
        )
    return tuned if added else None
