"""A sentencepiece model file as plain values.

The file is one protocol-buffers message (`sentencepiece_model.proto` of the sentencepiece project),
of which a few fields are needed. Reading these takes less than the packages that could do it,
which lorakit does not need otherwise.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from lorakit.errors import InputError


class Kind(IntEnum):
    """What a piece is for."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    """How a text is cut into pieces."""

    UNIGRAM = 1
    BPE = 2


@dataclass(frozen=True)
class Piece:
    """A token: its text, and the score by which it is preferred."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceFile:
    """What of the file decides the tokens of a text.

    `charsmap` is the compiled normalisation, empty where there is none.
    """

    pieces: list[Piece]
    algorithm: Algorithm
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    @property
    def unknown(self) -> int:
        """The number of the unknown token."""
        return next(i for i, piece in enumerate(self.pieces) if piece.kind is Kind.UNKNOWN)


def read_sentencepiece(path: Path) -> SentencePieceFile:
    """Reads the model file at `path`.

    Raises:
        InputError: it is missing, damaged, or of a kind whose rules are not known here.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"model: {path} cannot be read: {error.strerror}") from error
    try:
        fields = list(_fields(content))
        pieces = [_piece(value) for number, value in fields if number == 1]
        trainer = dict(_fields(_only(fields, 2)))
        normalizer = dict(_fields(_only(fields, 3)))
        algorithm = trainer.get(3, Algorithm.UNIGRAM)
        unknown = [piece for piece in pieces if piece.kind is Kind.UNKNOWN]
        charsmap = normalizer.get(2, b"")
        if not isinstance(charsmap, bytes) or len(unknown) != 1:
            raise ValueError("it has no token for what is unknown")
    except (ValueError, IndexError, struct.error, TypeError) as error:
        raise InputError(
            f"model: {path} is no sentencepiece model, damaged or cut off: copy or fetch it again"
        ) from error
    if algorithm not in list(Algorithm) or trainer.get(24, 0) or not normalizer.get(5, 1):
        raise InputError(
            f"model: {path} is a sentencepiece model of another kind than BPE or unigram with a "
            "mark before each word, and has no known form as a fast tokenizer"
        )
    return SentencePieceFile(
        pieces,
        Algorithm(algorithm),
        bool(trainer.get(35, 0)),
        charsmap,
        bool(normalizer.get(3, 1)),
        bool(normalizer.get(4, 1)),
    )


def _piece(message: int | bytes) -> Piece:
    fields = dict(_fields(message))
    text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
    kind = fields.get(3, int(Kind.NORMAL))
    if isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int):
        return Piece(text.decode(), struct.unpack("<f", score)[0], Kind(kind))
    raise ValueError("a piece with values of other types")


def _only(fields: list[tuple[int, int | bytes]], number: int) -> int | bytes:
    return next((value for found, value in fields if found == number), b"")


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
        if kind == 2:
            size, place = _whole(message, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"fields of kind {kind} are not in use")
        if place + size > len(message):
            raise ValueError("it ends too early")
        yield number, message[place : place + size]
        place += size


def _whole(message: bytes, place: int) -> tuple[int, int]:
    """A whole number of variable length, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
