"""A sentencepiece model as a tokenizer of the `tokenizers` library, with ChatGLM's marks after it.

The ids are sentencepiece's. Like ChatGLM's own code for chats, each stretch of text between two
marks is cut by itself, so each begins with sentencepiece's space.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, listed
from lorakit.models.layouts.chatglm.sentencepiece_file import (
    Algorithm,
    Kind,
    SentencePieceFile,
    read_sentencepiece,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPACE = "\u2581"
_HIDDEN = "\ufdd0"  # no character of any text (Unicode keeps it for programs' own use)


def sentencepiece_tokenizer(path: Path, marks: Sequence[str]) -> Tokenizer:
    """The model file at `path` as a fast tokenizer; `marks` get the ids behind its pieces.

    A mark that is a bare word (`sop`) is one only where no letter stands beside it, so that
    "philosophy" is text.

    Raises:
        InputError: the file is missing or damaged, or of a kind with no such form.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    file = read_sentencepiece(path)
    tokenizer = Tokenizer(_model(path, file, marks))
    steps: list[Any] = [normalizers.Precompiled(file.charsmap)] if file.charsmap else []
    if file.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(_regex(" {2,}"), " ")]
    if file.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if file.add_dummy_prefix else []),
        ]
    )
    own = [p.text for p in file.pieces if p.kind in (Kind.UNKNOWN, Kind.CONTROL)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in own])
    if given := [p.text for p in file.pieces if p.kind is Kind.USER_DEFINED]:
        warnings.warn(
            f"{path} has pieces that were given to it ({listed(given, 3)}): text behind one gets "
            "a space that sentencepiece does not give it",
            stacklevel=3,
        )
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in given])
    tokenizer.add_special_tokens(
        [AddedToken(m, normalized=False, special=True, single_word=m.isalpha()) for m in marks]
    )
    ids = [tokenizer.token_to_id(mark) for mark in marks]
    if ids != list(range(len(file.pieces), len(file.pieces) + len(marks))):
        raise InputError(f"model: {path} holds a mark of chats among its pieces: fetch it again")
    return tokenizer


def _model(path: Path, file: SentencePieceFile, marks: Sequence[str]) -> Any:
    """The part that cuts text: BPE by merges in the order of scores, or unigram."""
    from tokenizers import models

    # A piece that is written as a mark keeps its number, but not its text, which is the mark's.
    texts = [piece.text + _HIDDEN * (piece.text in marks) for piece in file.pieces]
    vocabulary = {text: i for i, text in enumerate(texts)}
    if len(vocabulary) != len(texts):
        raise InputError(f"model: {path} is damaged: it has a piece twice")
    if file.algorithm is Algorithm.UNIGRAM:
        scored = [(t, p.score) for t, p in zip(texts, file.pieces, strict=True)]
        return models.Unigram(scored, file.unknown, file.byte_fallback)
    return models.BPE(
        vocabulary,
        _merges(file, vocabulary),
        unk_token=texts[file.unknown],
        fuse_unk=True,
        byte_fallback=file.byte_fallback,
    )


def _merges(file: SentencePieceFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together of two others, the pieces with higher scores first."""
    normal = {p.text: p.score for p in file.pieces if p.kind is Kind.NORMAL}
    normal = {text: score for text, score in normal.items() if text in vocabulary}
    return [
        (text[:cut], text[cut:])
        for text in sorted(normal, key=lambda text: (-normal[text], vocabulary[text]))
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)
