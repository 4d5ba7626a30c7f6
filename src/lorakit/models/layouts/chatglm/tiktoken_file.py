"""GLM-4's vocabulary, tokens of bytes with ranks in tiktoken's form, as a fast tokenizer.

Its rules are those of `tokenization_chatglm.py` in THUDM/glm-4-9b-chat: the expression below cuts a
text into stretches, and in each the neighbours with the lowest rank are joined first.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_STRETCHES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tiktoken_tokenizer(path: Path, marks: Sequence[str]) -> Tokenizer:
    """The vocabulary at `path` as a fast tokenizer; `marks` get the ids behind its ranks."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks = read_ranks(path)
    letters = bytes_to_unicode()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]]) for token in ranks for cut in _cuts(token, ranks)
    ]
    # A whole stretch that is a token is one, whether or not joining its parts would lead there.
    model = models.BPE({names[t]: rank for t, rank in ranks.items()}, merges, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_STRETCHES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(m, normalized=False, special=True) for m in marks])
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Every token and its rank, in the order of ranks.

    Raises:
        InputError: the file is missing, damaged or cut off.
    """
    ranks: dict[bytes, int] = {}
    try:
        for number, line in enumerate(path.read_bytes().splitlines()):
            token, rank = line.split()
            if int(rank) != number:
                raise ValueError(f"line {number + 1} has the rank {int(rank)}")
            ranks[base64.b64decode(token, validate=True)] = number
    except OSError as error:
        raise InputError(f"model: {path} cannot be read: {error.strerror}") from error
    except (ValueError, binascii.Error) as error:
        raise InputError(
            f"model: {path} is a damaged vocabulary ({error}): copy or fetch it again"
        ) from error
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise InputError(f"model: {path} is cut off: it lacks tokens of single bytes")
    return ranks


def _cuts(token: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Where a token can be cut into two others, the pair with the lowest ranks first."""
    cuts = [c for c in range(1, len(token)) if token[:c] in ranks and token[c:] in ranks]
    return sorted(cuts, key=lambda cut: (ranks[token[:cut]], ranks[token[cut:]]))
