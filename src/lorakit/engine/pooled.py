"""Numbers of a prompt instead of an answer: its embedding, or what a reward model gives to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lorakit.engine.requests import AnswerPiece
from lorakit.engine.scoring import score
from lorakit.lora.routing import BASE, Route

if TYPE_CHECKING:
    from lorakit.engine.pool import Version
    from lorakit.engine.requests import Ticket
    from lorakit.lora.routing import Routing


def pooled(
    model: Any,
    routing: Routing,
    ticket: Ticket,
    version: Version | None,
    head: torch.Tensor | None,
) -> AnswerPiece:
    """The only piece of a request for an embedding, or for what a head gives.

    Args:
        version: of its adapter, which is in the bank; None for the base.
        head: the reward model's or classifier's.
    """
    of = model, routing, BASE if version is None else version.key
    if ticket.sampling.embeds or version is None or head is None:
        return AnswerPiece(finish_reason="stop", embedding=embedding(*of, ticket.prompt))
    pad = int(version.tokenizer.pad_token_id)
    return AnswerPiece(finish_reason="stop", scores=score(*of, head, ticket.prompt, pad))


def embedding(
    model: Any, routing: Routing, adapter: str, tokens: Sequence[int]
) -> tuple[float, ...]:
    """What an adapter of `model` makes of the last token, of length 1 (d,).

    The last hidden state of a causal model has read all tokens (Wang et al. 2023,
    arXiv:2401.00368).
    """
    ids = torch.tensor([[*tokens]], device=next(model.parameters()).device)
    with routing.using(Route.of_rows((adapter,))):
        h = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].float()
    return tuple((h / h.norm().clamp_min(1e-12)).tolist())
