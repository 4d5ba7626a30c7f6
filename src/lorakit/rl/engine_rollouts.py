"""Completions by the resident model itself: the very weights that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lorakit.engine.sampler import Sampler
from lorakit.engine.sampling import Sampling
from lorakit.objectives.rollout import AskedPrompt, Rollout
from lorakit.progress import task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.engine.rows import AnswerRow
    from lorakit.lora.model import LoraModel
    from lorakit.objectives.objective import Objective


class EngineRollouts:
    """Samples on the engine, all prompts together; a `RolloutSource`.

    Args:
        tokenizer: says what ends a completion.
    """

    def __init__(self, objective: Objective, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._sampler: Sampler | None = None

    def write(
        self, asked: Sequence[AskedPrompt], model: LoraModel, step: int | None
    ) -> list[Rollout]:
        """As in `RolloutSource`."""
        return self.write_each(asked, (), model)

    def write_each(
        self, asked: Sequence[AskedPrompt], adapters: Sequence[str], model: LoraModel
    ) -> list[Rollout]:
        """The same in one batch with adapters of several runs.

        Args:
            adapters: of each prompt, `BASE` for none; empty where the route in force is that of
                all of them.
        """
        if self._sampler is None:
            self._sampler = Sampler(model, self._tokenizer)
        was_training, route = model.training, model.routing.route
        model.eval()
        try:
            # Compiled for training, the blocks would be compiled again for every length.
            with (
                torch.compiler.set_stance("force_eager"),
                task("sampling completions", len(asked)) as work,
            ):
                tokens: list[Any] = [one.tokens for one in asked]
                sampling = [_sampling(one) for one in asked]
                rows = self._sampler.write(tokens, sampling, route, work, adapters=adapters)
        finally:
            model.train(was_training)
        return [self._rollout(row) for row in rows]

    def _rollout(self, row: AnswerRow) -> Rollout:
        pieces = [*row.ticket]
        assert self._sampler is not None
        tokens, ending = list(row.tokens), self._sampler.ending
        ended = pieces[-1].finish_reason != "length"
        written = tokens[:-1] if ended and tokens[-1:] and tokens[-1] in ending.tokens else tokens
        text = str(self._tokenizer.decode(written, skip_special_tokens=True))
        if ending.text:
            text = text.partition(ending.text)[0]
        return Rollout(
            tokens,
            [chosen.logprob for piece in pieces for chosen in piece.logprobs],
            "stop" if ended else "length",
            text,
        )


def _sampling(one: AskedPrompt) -> Sampling:
    return Sampling(
        temperature=one.temperature,
        top_p=one.top_p,
        max_new_tokens=one.max_new_tokens,
        seed=one.seed,
        top_k=one.top_k,
        min_p=one.min_p,
        repetition_penalty=one.repetition_penalty,
        logprobs=0 if one.logprobs else None,
        scaled_logprobs=one.logprobs,
    )
