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

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "\u2581"
_HIDDEN = "\ufdd0"  # no character of any text (Unicode keeps it for programs' own use)
_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # types of pieces


def sentencepiece_tokenizer(path: Path, marks: Sequence[str]) -> Tokenizer:
    """The model file at `path` as a fast tokenizer; `marks` get the ids behind its pieces.

    A mark that is a bare word (`sop`) is one only where no letter stands beside it, so that
    "philosophy" is text.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers

    file = read_sentencepiece(path)
    tokenizer = Tokenizer(_model(path, file, marks))
    rules, charsmap = file.normalizer_spec, file.normalizer_spec.precompiled_charsmap
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    joined = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    first = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([*joined, *first])
    own = [p.piece for p in file.pieces if p.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in own])
    if given := [p.piece for p in file.pieces if p.type == _USER_DEFINED]:
        warnings.warn(
            f"{path} has user-defined pieces ({listed(given, 3)}): text after one gets a space "
            "that sentencepiece does not add",
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


def _model(path: Path, file: Any, marks: Sequence[str]) -> Any:
    """The part that cuts text: BPE by merges in the order of scores, or unigram."""
    from tokenizers import models

    # A piece that is written as a mark keeps its number, but not its text, which is the mark's.
    texts = [p.piece + _HIDDEN * (p.piece in marks) for p in file.pieces]
    unknown = next(i for i, piece in enumerate(file.pieces) if piece.type == _UNKNOWN)
    vocabulary = {text: i for i, text in enumerate(texts)}
    if len(vocabulary) != len(texts):
        raise InputError(f"model: {path} is damaged: it has a piece twice")
    byte_fallback = file.trainer_spec.byte_fallback
    if file.trainer_spec.model_type == _UNIGRAM:
        scored = [(t, p.score) for t, p in zip(texts, file.pieces, strict=True)]
        return models.Unigram(scored, unknown, byte_fallback)
    return models.BPE(
        vocabulary,
        _merges(file, vocabulary),
        unk_token=texts[unknown],
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def _merges(file: Any, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together of two others, the pieces with higher scores first."""
    pieces = [(p.piece, p.score) for p in file.pieces if p.type == _NORMAL]
    normal = {text: score for text, score in pieces if text in vocabulary}
    return [
        (text[:cut], text[cut:])
        for text in sorted(normal, key=lambda text: (-normal[text], vocabulary[text]))
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]


def read_sentencepiece(path: Path) -> Any:
    """The model file at `path`, as sentencepiece's `ModelProto`.

    Raises:
        InputError: it is missing, damaged, or of a kind whose rules are not known here.
    """
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    file = import_protobuf().ModelProto()
    try:
        file.ParseFromString(path.read_bytes())
        if [piece.type for piece in file.pieces].count(_UNKNOWN) != 1:
            raise ValueError("it has no token for what is unknown")
    except OSError as error:
        raise InputError(f"model: {path} cannot be read: {error.strerror}") from error
    except (DecodeError, ValueError) as error:
        raise InputError(
            f"model: {path} is not a sentencepiece model, damaged or cut off: copy or fetch it "
            "again"
        ) from error
    trained, rules = file.trainer_spec, file.normalizer_spec
    known = trained.model_type in (_UNIGRAM, _BPE)
    if not known or trained.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise InputError(
            f"model: {path} is a sentencepiece model of another kind than BPE or unigram with a "
            "mark before each word, and has no known form as a fast tokenizer"
        )
    return file
