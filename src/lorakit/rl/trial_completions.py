"""Completions of prompts outside a run, written and read as a run does it, to try rewards on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.data.prompt_tokens import PromptRow, prompt_row
from lorakit.data.samples import Sample
from lorakit.engine.requests import context_length_of
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from lorakit.objectives.registry import default_objective
from lorakit.objectives.rollout import AskedPrompt
from lorakit.rewards.inputs_of_rows import reward_input
from lorakit.rewards.reward_table import RewardInput
from lorakit.rl.engine_rollouts import EngineRollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.lora.model import LoraModel


def sampled_completions(
    model: LoraModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    number: int,
    sampling: Sampling,
) -> list[RewardInput]:
    """So many completions of each prompt, those of one prompt in a row.

    Args:
        model: under the route in force.
        sampling: of all; each completion has a seed of its own that follows from its seed.

    Raises:
        InputError: a prompt does not fit the context, or the chat template refuses it.
        LorakitError: the model failed.
    """
    context = context_length_of(model.get_base_model())
    asked: list[AskedPrompt] = []
    for sample in samples:
        row = prompt_row(sample, tokenizer, context)
        if not isinstance(row, PromptRow):
            raise InputError(
                f"{sample.where}: the prompt has {len(row) + row.cut:,} tokens, and the model "
                f"reads {context:,}: shorten it or drop the row"
            )
        for _ in range(number):
            asked.append(
                AskedPrompt(
                    row.input_ids,
                    min(sampling.max_new_tokens, context - len(row)),
                    sampling.temperature,
                    ((sampling.seed or 0) + len(asked)) % 2**32,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    min_p=sampling.min_p,
                    repetition_penalty=sampling.repetition_penalty,
                    sample=sample,
                )
            )
    rollouts = EngineRollouts(default_objective("CAUSAL_LM"), tokenizer).write(asked, model, None)
    return [
        reward_input(samples[i // number], one.text, one.tokens, one.messages, one.finish_reason)
        for i, one in enumerate(rollouts)
    ]
