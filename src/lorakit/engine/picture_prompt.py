"""A prompt as tokens, with the pictures that stand in it; and what a model is given of several."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.boundaries import encode_texts
from lorakit.data.conversations import Message, pictures_of
from lorakit.data.masking import TokenizedRow
from lorakit.data.picture_rows import RowPictures, expanded, kinds_of, placed, tensors_of
from lorakit.engine.bounded_tokens import TooManyTokensError, tokens_within
from lorakit.models.picture_reader import reader_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """Pictures that are looked at together, mostly one.

    Attributes:
        key: the hash of their files.
        sources: where they are.
        tensors: what the processor makes of them; None where their features are known.
    """

    key: str
    sources: tuple[str, ...]
    tensors: dict[str, torch.Tensor] | None


def prompt_row(
    text: str,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    limit: int = sys.maxsize,
    where: str = "the prompt",
) -> TokenizedRow:
    """A rendered conversation's tokens and pictures, with nothing to learn.

    Args:
        text: as the chat template writes `messages`.
        limit: how many tokens there may be.

    Raises:
        TooManyTokensError: there are more.
        InputError: a picture cannot be used, or the model reads none.
    """
    sources = [source for message in messages for source in pictures_of(message.get("content"))]
    if not sources:
        return TokenizedRow(tokens_within(text, tokenizer, limit), [], where)
    if len(text) // 8 > limit:  # far too long, which is told without its pictures
        tokens_within(text, tokenizer, limit)
    found = expanded(text, sources, tokenizer, where)
    [encoded] = encode_texts([found.text], tokenizer)
    if len(encoded.ids) > limit:
        raise TooManyTokensError(len(encoded.ids), limit, counted=True)
    reader = reader_of(tokenizer)
    assert reader is not None
    pictures = RowPictures(placed(sources, found.places, encoded.starts), reader)
    return TokenizedRow(encoded.ids, [], where, pictures=pictures)


def picture_inputs(
    rows: Sequence[TokenizedRow], width: int, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """What the model is given of the pictures of prompts that are padded on the left to `width`.

    Beside their tokens; nothing where no prompt has a picture.
    """
    tensors, _ = tensors_of(rows)
    given = {name: x.to(device) for name, x in tensors.items()}
    return {**picture_kinds(rows, width, device), **given}


def picture_kinds(
    rows: Sequence[TokenizedRow], width: int, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Which tokens of such prompts are of pictures, where the model asks for it."""
    import torch

    return {
        name: torch.tensor([[0] * (width - len(row)) + row for row in own], device=device)
        for name, own in kinds_of(rows).items()
    }


def place_pictures(
    prompt: TokenizedRow, given: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], int]:
    """The positions of a prompt whose pictures move them, and by how much those behind are moved.

    Args:
        given: what the model is given of the pictures of the prompt, alone and without padding.

    Returns: `position_ids` (4, 1, tokens); nothing where positions have one dimension.
    """
    positions = None if prompt.pictures is None else prompt.pictures.reader.positions
    if positions is None:
        return {}, 0
    kinds = given["mm_token_type_ids"]
    found, moved = positions.of_row(prompt.input_ids, kinds[0].tolist(), given[positions.grids])
    return {"position_ids": found[:, None].to(kinds.device)}, moved
