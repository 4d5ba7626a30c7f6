"""What is asked of the model for the completions of a step: each prompt so many times."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lorakit.objectives.rollout import AskedPrompt

if TYPE_CHECKING:
    from lorakit.data.prompt_tokens import PromptRow
    from lorakit.objectives.grpo_settings import GrpoSettings


def asked_prompts(
    prompts: Sequence[PromptRow], settings: GrpoSettings, step: int | None, each: int, limit: int
) -> list[AskedPrompt]:
    """The prompts in order, each so many times.

    The seed of a completion depends on `settings.seed`, the step, the prompt and its number among
    the completions alone, not on how sampling is divided into batches or resumed.

    Args:
        step: optimizer steps so far; None for held-out prompts.
        limit: the most tokens of a prompt with its completion.
    """
    s = settings
    times: Counter[int] = Counter()
    found = []
    for prompt in prompts:
        room = min(s.max_completion_length, limit - len(prompt))
        for _ in range(each):
            generation = times[prompt.number]
            times[prompt.number] += 1
            place = f"{s.seed} {step} {generation} {prompt.input_ids}"
            one = AskedPrompt(
                prompt.input_ids,
                room,
                s.temperature if step is not None else s.temperature_eval,
                random.Random(place).getrandbits(32),
                sample=prompt.sample,
                generation=generation,
            )
            if step is not None:
                one = replace(
                    one,
                    top_p=s.top_p,
                    top_k=s.top_k,
                    min_p=s.min_p,
                    repetition_penalty=s.repetition_penalty,
                    logprobs=True,
                )
            found.append(one)
    return found
