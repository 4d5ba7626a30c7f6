"""A sentencepiece model as a tokenizer of the `tokenizers` library, with ChatGLM's marks after it.

The ids are sentencepiece's. Like ChatGLM's own code for chats, each stretch of text between two
marks is cut by itself, so each begins with sentencepiece's space. Of the file, one
protocol-buffers message (`sentencepiece_model.proto` of the sentencepiece project), a few fields
are read here; the packages that could do it are not needed otherwise.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorakit.errors import InputError, listed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "\u2581"
_HIDDEN = "\ufdd0"  # no character of any text (Unicode keeps it for programs' own use)
_UNIGRAM, _BPE = 1, 2


class Kind(IntEnum):
    """What a piece stands for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """A token: its text, and the score by which it is preferred."""

    text: str
    score: float
    kind: Kind


class SentencePieceFile(NamedTuple):
    """What of the file decides the tokens of a text.

    `charsmap` is the compiled normalisation, empty where there is none.
    """

    pieces: list[Piece]
    algorithm: int
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def sentencepiece_tokenizer(path: Path, marks: Sequence[str]) -> Tokenizer:
    """The model file at `path` as a fast tokenizer; `marks` get the ids behind its pieces.

    A mark that is a bare word (`sop`) is one only where no letter stands beside it, so that
    "philosophy" is text.

    Raises:
        InputError: the file is missing or damaged, or of a kind with no such form.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers

    file = read_sentencepiece(path)
    tokenizer = Tokenizer(_model(path, file, marks))
    steps: list[Any] = [normalizers.Precompiled(file.charsmap)] if file.charsmap else []
    if file.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if file.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    joined = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    first = [decoders.Strip(" ", 1, 0)] if file.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([*joined, *first])
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
    unknown = next(i for i, piece in enumerate(file.pieces) if piece.kind is Kind.UNKNOWN)
    vocabulary = {text: i for i, text in enumerate(texts)}
    if len(vocabulary) != len(texts):
        raise InputError(f"model: {path} is damaged: it has a piece twice")
    if file.algorithm == _UNIGRAM:
        scored = [(t, p.score) for t, p in zip(texts, file.pieces, strict=True)]
        return models.Unigram(scored, unknown, file.byte_fallback)
    return models.BPE(
        vocabulary,
        _merges(file, vocabulary),
        unk_token=texts[unknown],
        fuse_unk=True,
        byte_fallback=file.byte_fallback,
    )


def _merges(file: SentencePieceFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together of two others, the pieces with higher scores first."""
    normal = {
        p.text: p.score for p in file.pieces if p.kind is Kind.NORMAL and p.text in vocabulary
    }
    return [
        (text[:cut], text[cut:])
        for text in sorted(normal, key=lambda text: (-normal[text], vocabulary[text]))
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Reads the model file at `path`.

    Raises:
        InputError: it is missing, damaged, or of a kind whose rules are not known here.
    """
    try:
        fields = [*_fields(path.read_bytes())]
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer, normalizer = (
            dict(_fields(next((value for found, value in fields if found == number), b"")))
            for number in (2, 3)
        )
        algorithm, charsmap = trainer.get(3, _UNIGRAM), normalizer.get(2, b"")
        unknown = [piece for piece in pieces if piece.kind is Kind.UNKNOWN]
        if not isinstance(charsmap, bytes) or len(unknown) != 1:
            raise ValueError("it has no token for what is unknown")
    except OSError as error:
        raise InputError(f"model: {path} cannot be read: {error.strerror}") from error
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise InputError(
            f"model: {path} is no sentencepiece model, damaged or cut off: copy or fetch it again"
        ) from error
    known = isinstance(algorithm, int) and algorithm in (_UNIGRAM, _BPE)
    if not known or trainer.get(24, 0) or not normalizer.get(5, 1):
        raise InputError(
            f"model: {path} is a sentencepiece model of another kind than BPE or unigram with a "
            "mark before each word, and has no known form as a fast tokenizer"
        )
    byte_fallback, prefix, spaces = trainer.get(35, 0), normalizer.get(3, 1), normalizer.get(4, 1)
    return SentencePieceFile(
        pieces, int(algorithm), bool(byte_fallback), charsmap, bool(prefix), bool(spaces)
    )


def _piece(message: int | bytes) -> Piece:
    fields = dict(_fields(message))
    text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
    kind = fields.get(3, int(Kind.NORMAL))
    if isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int):
        return Piece(text.decode(), struct.unpack("<f", score)[0], Kind(kind))
    raise ValueError("a piece with values of other types")


def _fields(message: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: whole numbers, and bytes of everything else.

    Encoding: https://protobuf.dev/programming-guides/encoding/
    """
    if not isinstance(message, bytes):
        raise ValueError("a number where a message should be")
    place = 0
    while place < len(message):
        key, place = _whole(message, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _whole(message, place)
            yield number, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"fields of kind {kind} are not in use")
        size, place = _whole(message, place) if kind == 2 else (8 if kind == 1 else 4, place)
        if place + size > len(message):
            raise ValueError("it ends too early")
        yield number, message[place : place + size]
        place += size


def _whole(message: bytes, place: int) -> tuple[int, int]:
    """A whole number of variable length, and the place behind it."""
    value = shift = 0
    while shift <= 63:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise ValueError("a number of more than 64 bits")
