"""`prompt_logprobs`, vLLM's: how likely a prompt's own tokens are, each behind those before it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lorakit.engine.engine import Engine
from lorakit.engine.prompt_scores import PromptScores
from lorakit.server.replies import PromptLogprobs, finite


async def prompt_logprobs(
    engine: Engine, tokens: Sequence[int], adapter: str | None, top: int, owner: str
) -> PromptLogprobs:
    """For each token of a prompt itself and so many of the likeliest in its place, by their ids.

    Raises:
        InputError: as `Engine.score_prompt`.
    """
    asked = engine.score_prompt(tokens, adapter, top, owner, ranked=True)
    scores: PromptScores = await asyncio.wrap_future(asked)
    tokenizer, made = engine.tokenizer_of(adapter), PromptLogprobs()
    made.append(None)  # nothing is before the first
    for at, token in enumerate(tokens[1:], 1):
        own = {token: (scores.logprobs[at], scores.ranks[at])}
        rivals = {one: (value, rank) for rank, (one, value) in enumerate(scores.rivals[at], 1)}
        made.append(
            {
                str(one): {
                    "logprob": finite(value),
                    "rank": rank,
                    "decoded_token": str(tokenizer.decode([one])),
                }
                for one, (value, rank) in {**rivals, **own}.items()
            }
        )
    return made
