"""Tokens that a run adds to a base model: to its tokenizer, its embedding and its head.

Only their rows are trained (`trainable_token_indices`). A new token starts from the mean of the
pieces that its text had been split into, so that different ones start differently, near what their
names mean; the mean of all tokens (Hewitt 2021) would make all of them one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.errors import InputError, listed
from lorakit.lora.vocabulary import embeddings, vocabulary_size


@dataclass(frozen=True)
class TrainedRows:
    """The tokens whose rows a run trains.

    Attributes:
        added: those that the tokenizer did not have.
        rows: the numbers of all, by the path of the embedding, and of a head that is not tied.
    """

    added: tuple[str, ...]
    rows: dict[str, list[int]]


@torch.no_grad()
def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> TrainedRows:
    """Gives `tokenizer` and `model` the `tokens` that they lack, in place.

    They are ordinary tokens, which stand in decoded answers. The model gets rows where it has none
    to spare.

    Args:
        model: not wrapped yet.

    Raises:
        InputError: a token cannot be added.
    """
    for token in tokens:
        if not token.strip() or token != token.strip():
            raise InputError(f"tokens: {token!r} begins or ends with a space, or is empty")
    if len(set(tokens)) < len(tokens):
        raise InputError(f"tokens: {listed(map(repr, tokens))} has one twice: remove it")
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    added = tuple(token for token in tokens if token not in known)
    pieces = {t: tokenizer(t, add_special_tokens=False).input_ids for t in added}
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    number = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in tokens}
    if max(number.values()) >= (size := vocabulary_size(model)):
        if tables := [n for n, b in model.named_buffers() if len(b.shape) and b.shape[0] == size]:
            raise InputError(
                f"tokens: {type(model).__name__} has a table of its vocabulary ({tables[0]}), to "
                "which no token can be added: leave tokens out"
            )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows: dict[str, list[int]] = {}
    weights: list[torch.Tensor] = []
    for path, module in embeddings(model).items():
        weight: Any = module.weight
        if not weight.is_floating_point():
            raise InputError(f"tokens: {path} is quantised, so no row of it can be trained")
        if any(weight is other for other in weights):
            continue  # a head that is tied
        weights.append(weight)
        rows[path] = sorted(number.values())
        wide = torch.promote_types(weight.dtype, torch.float32)
        for token, own in pieces.items():
            start = weight[own] if own else weight[: len(known)]
            weight[number[token]] = start.mean(0, dtype=wide).to(weight)
    return TrainedRows(added, rows)
