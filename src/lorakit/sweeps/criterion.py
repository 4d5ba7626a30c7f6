"""What the best is chosen by: the held-out loss, or a metric of `lorakit eval` over answers.

A metric takes an answer to every prompt, which is expensive: only finished runs are asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lorakit import atomic
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.evaluation.answers import answer_samples
from lorakit.evaluation.bootstrap import Interval, score_interval
from lorakit.evaluation.evaluate import references
from lorakit.evaluation.metrics import METRICS
from lorakit.progress import task
from lorakit.sweeps.records import Record
from lorakit.sweeps.sweep_base import Split, SweepBase

ANSWERS_NAME = "sweep-answers.json"
_LONGEST = 128  # tokens of an answer


def check_objective(name: str, base: SweepBase) -> None:
    """Raises InputError unless the task's rows can be scored by `name`."""
    if name == "loss":
        return
    task = base.recipe.task_type
    if task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise InputError(f"sweep.objective {name} is of answers, which {task} has none of: loss")
    for part in base.splits.values():
        plain = next((s for s in part.samples if not s.messages), None)
        if plain is not None:
            raise InputError(f"{plain.where} is plain text, which {name} cannot score: use loss")


@dataclass(frozen=True)
class Criterion:
    """One number of a configuration on a split, by name: `loss`, or a metric of answers."""

    name: str
    base: SweepBase

    @property
    def sign(self) -> int:
        """1 where smaller is better, else -1."""
        return 1 if self.name == "loss" else -1

    def interval(self, record: Record, split: str, minus: Record | None = None) -> Interval:
        """The value of a finished configuration, less that of another, with its interval."""
        base = self.base
        if self.name == "loss":
            return base.interval(record.last.losses, split, minus.last.losses if minus else None)
        score, other = self._score(record, split), minus and self._score(minus, split)
        return score_interval(
            lambda which: score(which) - (other(which) if other else 0.0),
            base.splits[split].prompts,
            base.seed,
        )

    def prepare(self, record: Record) -> None:
        """Writes the answers that the metric scores, unless they are there already."""
        path = record.path.with_name(ANSWERS_NAME)
        if self.name == "loss" or path.is_file():
            return
        recipe = record.configuration.recipe
        asked = {
            name: [samples[0] for samples in _by_prompt(part)]
            for name, part in self.base.splits.items()
        }
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
        groups = _by_prompt(self.base.splits[split])
        wanted = references(self.base.inputs.tokenizer, groups, templated)
        metric = METRICS[self.name]
        return lambda which: metric([answers[i] for i in which], [wanted[i] for i in which])


def _by_prompt(part: Split) -> list[list[Sample]]:
    """The samples of each prompt, in the order of `units`."""
    found: list[list[Sample]] = [[] for _ in range(part.prompts)]
    for sample, unit in zip(part.samples, part.units, strict=True):
        assert isinstance(sample, Sample)
        found[unit].append(sample)
    return found
