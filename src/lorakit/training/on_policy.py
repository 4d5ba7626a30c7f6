"""Answers that the model in training samples at each step, for objectives that learn from them.

The objective says which prompts (`Objective.asked`) and makes rows of the answers; here they are
sampled, those of all batches of a step together, from the weights as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lorakit.engine.sampler import Sampler
from lorakit.engine.sampling import Sampling
from lorakit.progress import task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.lora.model import LoraModel
    from lorakit.objectives.objective import Collate, Objective

Tensors = dict[str, torch.Tensor]


class StudentAnswers:
    """Puts answers of the model into batches.

    Args:
        objective: asks for them.
        tokenizer: says what ends an answer.
        collate: makes a batch of rows.
    """

    def __init__(
        self, objective: Objective, tokenizer: PreTrainedTokenizerBase, collate: Collate
    ) -> None:
        self._objective, self._tokenizer, self._collate = objective, tokenizer, collate
        self._sampler: Sampler | None = None

    def put_into(
        self,
        batches: Sequence[Tensors],
        model: LoraModel,
        step: int,
    ) -> list[Tensors]:
        """The batches of an optimizer step, those that ask for answers with the model's.

        Args:
            model: under the route that is in force.
            step: optimizer steps so far.

        Raises:
            LorakitError: the model failed.
        """
        asked = [self._objective.asked(batch, step) for batch in batches]
        prompts = [prompt for several in asked for prompt in several]
        if not prompts:
            return [*batches]
        if self._sampler is None:
            self._sampler = Sampler(model, self._tokenizer)
        sampling = [
            Sampling(temperature=one.temperature, max_new_tokens=one.max_new_tokens, seed=one.seed)
            for one in prompts
        ]
        was_training, route = model.training, model.routing.route
        model.eval()
        try:
            # Compiled for training, the blocks would be compiled again for every length.
            with (
                torch.compiler.set_stance("force_eager"),
                task("sampling answers", len(prompts)) as work,
            ):
                tokens: list[Any] = [one.tokens for one in prompts]
                rows = iter(self._sampler.write(tokens, sampling, route, work))
        finally:
            model.train(was_training)
        answers = [[next(rows).tokens for _ in several] for several in asked]
        return [
            self._collate(self._objective.answered(batch, own)) if own else batch
            for batch, own in zip(batches, answers, strict=True)
        ]
