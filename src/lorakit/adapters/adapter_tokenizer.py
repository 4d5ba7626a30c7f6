"""The tokenizer in an adapter's folder, which is there where it has more tokens than the base's."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import InputError, listed
from lorakit.models.layouts import layout_of

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


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer in `folder`; without this file none is found there."""
    return (folder / "tokenizer_config.json").is_file()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`; InputError where there is none, or a damaged one."""
    try:
        return layout_of(folder).tokenizer()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"the tokenizer in {folder} is missing or damaged: copy or save it again"
        ) from error


def own_tokenizer(folder: Path, base: Any, rows: int) -> Any:
    """The tokenizer in an adapter's folder, where it has tokens that the base's has not; else None.

    Args:
        base: the base's tokenizer.
        rows: for how many tokens the model with the adapter has embeddings.
    """
    if not has_tokenizer(folder):
        return None
    own = load_tokenizer(folder)
    vocabulary = own.get_vocab()
    added = vocabulary.keys() - base.get_vocab().keys()
    if not added:
        return None
    if beyond := sorted(token for token in added if vocabulary[token] >= rows):
        message = (
            f"the tokenizer in {folder} has tokens that the model has no embeddings for "
            f"({listed(beyond, 3)}): that of the base is used"
        )
        warnings.warn(message, stacklevel=3)
        return None
    if own.pad_token_id is None:
        own.pad_token = own.eos_token
    return own


def require_same_pipeline(folder: Path, own: Any, base: Any) -> None:
    """Raises InputError for an adapter's tokenizer that does more than add tokens to the base's.

    What comes before and after the vocabulary (normalizer, pre-tokenizer, decoder) is a program of
    patterns and replacements, which could take any time and memory on some texts.
    """
    programs = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (own, base)]
    if None in programs:
        return
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        one, other = (getattr(program, part) for program in programs)
        if (one and one.__getstate__()) != (other and other.__getstate__()):
            raise InputError(
                f"the tokenizer in {folder} has another {part} than the base's: save the base's "
                "tokenizer there with the tokens added, or serve the adapter alone (--merged)"
            )


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def common_tokenizer(folders: Sequence[Path], notices: list[str]) -> Path | None:
    """The first of adapters' folders that has a tokenizer; a notice where another has another."""
    having = [folder for folder in folders if has_tokenizer(folder)]
    if any(_bytes(folder) != _bytes(having[0]) for folder in having[1:]):
        notices.append(
            f"the adapters have different tokenizers: that of {having[0]} is carried along"
        )
    return having[0] if having else None


def tokenizer_to_keep(base: Path, tuned: Path, rows: int, grown: bool) -> Path | None:
    """The folder `tuned`, where its tokenizer has tokens that the base's has not; else None.

    Args:
        base, tuned: models' folders.
        rows: for how many tokens the tuned model has embeddings.
        grown: whether these are more than the base's, so that it must say what they are.

    Raises:
        InputError: the tokenizers number the same tokens differently, there are more tokens than
            rows, or the tuned model does not say what its new ones are.
    """
    if not grown and not (has_tokenizer(base) and has_tokenizer(tuned)):
        return None
    if not grown and _bytes(base) == _bytes(tuned):
        return None
    known, found = (load_tokenizer(folder).get_vocab() for folder in (base, tuned))
    if grown and not has_tokenizer(tuned):
        raise InputError(
            f"{tuned} has more tokens than {base}, and no tokenizer_config.json, without which its "
            "tokenizer is not found: save the tokenizer there (tokenizer.save_pretrained)"
        )
    if moved := [token for token in known if found.get(token, known[token]) != known[token]]:
        raise InputError(
            f"the tokenizer of {tuned} gives {len(moved)} tokens other ids than that of {base} "
            f"({listed(map(repr, moved), 3)}): tokens can only be added after the others"
        )
    added = [number for token, number in found.items() if token not in known]
    if (last := max(added, default=0)) >= rows:
        raise InputError(
            f"the tokenizer of {tuned} has tokens up to the number {last}, and the model has "
            f"embeddings for {rows}: give it the rows (model.resize_token_embeddings), and save it"
        )
    return tuned if added else None


def _bytes(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()]
