"""Metrics of generated answers during training: `eval.generate` in a recipe.

At each evaluation the model answers held-out prompts, greedily, and the answers are scored as
`lorakit eval` scores them. The values stand beside the held-out loss: they are logged, recorded,
and can choose the best model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.judged_rows import JudgedSample
from lorakit.errors import InputError
from lorakit.evaluation.answers import answer_samples
from lorakit.evaluation.evaluate import references
from lorakit.evaluation.metrics import METRICS
from lorakit.models.loaded import base_model
from lorakit.progress import task

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.samples import Sample
    from lorakit.objectives.objective import Objective
    from lorakit.training.evaluation_recipe import GenerateSettings


@dataclass(frozen=True)
class HeldOutAnswers:
    """Held-out prompts, the answers that their rows have, and how they are answered and scored."""

    settings: GenerateSettings
    tokenizer: PreTrainedTokenizerBase
    asked: list[Sample]
    wanted: list[list[str]]

    @property
    def names(self) -> list[str]:
        """The scores."""
        return self.settings.metrics

    def scores(self, model: nn.Module, process: int = 0, processes: int = 1) -> dict[str, float]:
        """Each metric of the model's answers; all processes must call it, each answers a part.

        Args:
            process, processes: which one of how many.
        """
        import torch

        settings, mine = self.settings, self.asked[process::processes]
        # Compiled for training, the blocks would be compiled again for every length.
        with (
            torch.compiler.set_stance("force_eager"),
            task("answering held-out prompts", len(mine)),
        ):
            written = answer_samples(
                model,
                self.tokenizer,
                mine,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
            )
        answers = {process + i * processes: one.answer for i, one in enumerate(written)}
        if processes > 1:
            from accelerate.utils import gather_object

            answers = dict(gather_object([*answers.items()]))
        in_order = [answers[i] for i in range(len(self.asked))]
        return {name: METRICS[name](in_order, self.wanted) for name in self.names}


def by_prompt(objective: Objective, samples: Sequence[Any]) -> list[list[Sample]]:
    """The samples of each prompt that a model can be asked, with answers to compare with.

    Answers that are judged undesirable are no references; of a pair it is the chosen one.
    """
    groups: dict[str, list[Sample]] = {}
    for sample in objective.prompts(samples):
        undesirable = isinstance(sample, JudgedSample) and not sample.desirable
        # The chosen conversation of a pair may have further turns behind its first answer.
        if not undesirable and sample.learned[-1:] == [len(sample.prompt)]:
            groups.setdefault(sample.prompt_key, []).append(sample)
    return [*groups.values()]


def held_out_answers(
    settings: GenerateSettings,
    objective: Objective,
    samples: Sequence[Any],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
) -> HeldOutAnswers:
    """The first `settings.rows` prompts of held-out `samples`, each with all its answers.

    Raises:
        InputError: the objective writes no answers, or no row has a prompt and a reference.
    """
    chosen = by_prompt(objective, samples)[: settings.rows]
    if not chosen:
        raise InputError(
            f"eval.generate: no held-out row has a prompt and an answer to compare with (objective "
            f"{objective.name}): leave it out"
        )
    templated = not base_model(model).config.is_encoder_decoder
    asked = [group[0] for group in chosen]
    return HeldOutAnswers(settings, tokenizer, asked, references(tokenizer, chosen, templated))
