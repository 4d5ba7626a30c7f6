"""Many prompts scored in one engine, in passes of its choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from lorakit.engine.engine import Engine, ToScore
from lorakit.engine.prompt_scores import PromptScores, Scored
from lorakit.engine.requests import check_prompt
from lorakit.engine.rows import reason
from lorakit.errors import LorakitError
from lorakit.lora.routing import BASE
from lorakit.progress import task


def score_all(engine: Engine, prompts: Sequence[Scored]) -> list[PromptScores]:
    """The scores of prompts, in their order; what they begin with alike is computed once a pass.

    Args:
        prompts: each with the name of an adapter of the pool, or `BASE`. The last token is not
            read, so that a prompt may be longer than the context by that one.

    Raises:
        InputError: there is no such adapter, or a prompt is empty or too long.
        LorakitError: the model failed.
    """
    names = dict.fromkeys(prompt.adapter for prompt in prompts)
    found = {name: engine.found(None if name == BASE else name) for name in names}
    asked: list[ToScore] = []
    for prompt in prompts:
        check_prompt(prompt.tokens, engine.context_length + 2, engine.vocabulary)
        version, loaded = found[prompt.adapter]
        key = BASE if version is None else version.key
        asked.append((replace(prompt, adapter=key), version, loaded, None))
    scores = [PromptScores([], [])] * len(prompts)
    call = partial(engine.training.call, None, owner="prompts")
    with task("scoring", len(prompts)) as work:
        try:
            passes = call(lambda: engine.scorer.passes([one for one, *_ in asked])).result()
            for chosen in passes:
                some = [asked[i] for i in chosen]
                tokens = sum(len(one.tokens) for one, *_ in some)
                computed = call(partial(engine.score_together, some), tokens=tokens).result()
                for i, own in zip(chosen, computed, strict=True):
                    scores[i] = own
                work.advance(len(chosen))
        except LorakitError:
            raise
        except Exception as error:
            raise LorakitError(f"the model failed while scoring: {reason(error)}") from error
    return scores
