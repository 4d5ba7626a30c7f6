"""What the best is chosen by: the held-out loss, a held-out score, or a metric of answers.

Loss and scores (`accuracy`, `margin`, …) are known of every configuration at every rung. A metric
takes an answer to every prompt, which is expensive: only finished runs are asked, and until then
configurations are compared by the loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lorakit import atomic
from lorakit.bootstrap import Interval, score_interval, sums_interval
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.evaluation.answers import answer_samples
from lorakit.evaluation.evaluate import references
from lorakit.evaluation.metrics import METRICS
from lorakit.progress import task
from lorakit.sweeps.records import Record, Rung
from lorakit.sweeps.space.sweep_settings import check_criterion
from lorakit.sweeps.splits import SELECTION
from lorakit.sweeps.sweep_base import SweepBase
from lorakit.training.generation import by_prompt

ANSWERS_NAME = "sweep-answers.json"
_LONGEST = 128  # tokens of an answer


def check_objective(name: str, base: SweepBase) -> None:
    """Raises InputError unless the task's rows can be scored by `name`."""
    objective = base.inputs.objective
    check_criterion(name, objective)
    if name not in METRICS:
        return
    for part in base.splits.values():
        plain = next((s for s in part.samples if not s.messages), None)
        if plain is not None:
            raise InputError(f"{plain.where} is plain text, which {name} cannot score: use loss")
        if not by_prompt(objective, part.samples):
            raise InputError(
                f"sweep.objective {name}: no held-out row has a prompt and an answer to compare "
                "with: use loss"
            )


@dataclass(frozen=True)
class Criterion:
    """One number of a configuration on a split, by name: `loss`, a score, or a metric."""

    name: str
    base: SweepBase

    @property
    def of_answers(self) -> bool:
        """Whether it is a metric of answers, which finished runs alone have."""
        return self.name in METRICS

    @property
    def sign(self) -> int:
        """1 where smaller is better, else -1."""
        lower = ("loss", *self.base.inputs.objective.lower_is_better)
        return 1 if self.name in lower else -1

    def cost(self, rung: Rung) -> float:
        """What configurations are compared by at a rung: smaller is better."""
        if self.of_answers or self.name == "loss":
            return rung.means[SELECTION]
        sums = {name: rows.sum(0) for name, rows in rung.sums(SELECTION).items()}
        return self.sign * self._of_sums(sums)

    def shown(self, cost: float) -> str:
        """A cost in words."""
        if self.of_answers or self.name == "loss":
            return f"a loss of {cost:.4f}"
        return f"{self.name} {self.sign * cost:.4f}"

    def interval(self, record: Record, split: str, minus: Record | None = None) -> Interval:
        """The value of a finished configuration, less that of another, with its interval."""
        if not self.of_answers:
            return self.at_rung(record.last, split, minus.last if minus else None)
        score, other = self._score(record, split), minus and self._score(minus, split)
        return score_interval(
            lambda which: score(which) - (other(which) if other else 0.0),
            len(self._asked[split]),
            self.base.seed,
        )

    def at_rung(self, rung: Rung, split: str, minus: Rung | None = None) -> Interval:
        """The value at a rung, less that of another; the loss where it is of answers."""
        base = self.base
        if self.of_answers or self.name == "loss":
            return base.interval(rung.losses, split, minus.losses if minus else None)
        other = minus.sums(split) if minus else None
        units = base.splits[split].units
        return sums_interval(self._of_sums, rung.sums(split), units, base.seed, other)

    def _of_sums(self, sums: Mapping[str, Any]) -> float:
        return self.base.inputs.objective.held_out(sums)[self.name]

    def prepare(self, record: Record) -> None:
        """Writes the answers that the metric scores, unless they are there already."""
        path = record.path.with_name(ANSWERS_NAME)
        if not self.of_answers or path.is_file():
            return
        recipe = record.configuration.recipe
        asked = {name: [group[0] for group in groups] for name, groups in self._asked.items()}
        with (
            self.base.with_adapter(Path(recipe.output_dir), recipe) as model,
            task(f"answering with {record.name}", sum(map(len, asked.values()))),
        ):
            tokenizer = self.base.inputs.tokenizer
            answers = {
                name: [
                    one.answer
                    for one in answer_samples(model, tokenizer, own, max_new_tokens=_LONGEST)
                ]
                for name, own in asked.items()
            }
        atomic.write_file(path, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")

    def _score(self, record: Record, split: str) -> Callable[[list[int]], float]:
        """The metric of the answers to some of the prompts."""
        path = record.path.with_name(ANSWERS_NAME)
        answers = json.loads(path.read_text(encoding="utf-8"))[split]
        templated = self.base.recipe.task_type != "SEQ_2_SEQ_LM"
        wanted = references(self.base.inputs.tokenizer, self._asked[split], templated)
        metric = METRICS[self.name]
        return lambda which: metric([answers[i] for i in which], [wanted[i] for i in which])

    @cached_property
    def _asked(self) -> dict[str, list[list[Sample]]]:
        """By split, the samples of each prompt that is asked."""
        objective = self.base.inputs.objective
        return {name: by_prompt(objective, part.samples) for name, part in self.base.splits.items()}
