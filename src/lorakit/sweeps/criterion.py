"""What the best is chosen by: the held-out loss, or a metric of `lorakit eval` over answers.

A metric takes answers of every row, which is dear: it is asked of those alone that finished.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import atomic
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.evaluation.answers import generate_targets, write_answers
from lorakit.evaluation.evaluate import references
from lorakit.evaluation.metrics import METRICS
from lorakit.progress import task
from lorakit.sweeps.base import Split, SweepBase
from lorakit.sweeps.bootstrap import Interval, loss_interval, score_interval
from lorakit.sweeps.records import Record

if TYPE_CHECKING:
    from lorakit.lora import LoraModel

ANSWERS_NAME = "sweep-answers.json"
_LONGEST = 128  # tokens of an answer

Score = Callable[[list[int]], float]


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
    """One number of a configuration on a split; `sign` is 1 where smaller is better, else -1."""

    name: str
    base: SweepBase
    seed: int

    @property
    def sign(self) -> int:
        """1 where smaller is better."""
        return 1 if self.name == "loss" else -1

    def interval(self, record: Record, split: str, minus: Record | None = None) -> Interval:
        """The value of a finished configuration, less that of another, with its interval."""
        part = self.base.splits[split]
        if self.name == "loss":
            others = minus.last.losses[split] if minus else None
            return loss_interval(record.last.losses[split], part.units, self.seed, others)
        score, other = self._score(record, split), minus and self._score(minus, split)
        return score_interval(
            lambda which: score(which) - (other(which) if other else 0.0),
            max(part.units) + 1,
            self.seed,
        )

    def prepare(self, record: Record) -> None:
        """Makes what the value is taken of: the answers, unless they are there already."""
        path = _answers_path(record)
        if self.name == "loss" or path.is_file():
            return
        folder = Path(record.configuration.recipe.output_dir)
        name, prompts = record.configuration.name, map(_asked, self.base.splits.values())
        with (
            self.base.with_adapter(folder, record.configuration.recipe) as model,
            task(f"answering with {name}", sum(map(len, prompts))),
        ):
            answers = {name: self._answers(model, part) for name, part in self.base.splits.items()}
        atomic.write_file(path, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")

    def _answers(self, model: LoraModel, part: Split) -> list[str]:
        """An answer to each prompt of a split."""
        asked = _asked(part)
        tokenizer = self.base.begun.tokenizer
        if self.base.recipe.task_type == "SEQ_2_SEQ_LM":
            return generate_targets(model, tokenizer, asked, max_new_tokens=_LONGEST)
        written = write_answers(
            model,
            tokenizer,
            [sample.prompt for sample in asked],
            tools=[sample.tools for sample in asked],
            max_new_tokens=_LONGEST,
        )
        return [one.answer for one in written]

    def _score(self, record: Record, split: str) -> Score:
        """The metric of the answers to some of the prompts."""
        answers = json.loads(_answers_path(record).read_text(encoding="utf-8"))[split]
        wanted = self._references(self.base.splits[split])
        metric = METRICS[self.name]
        return lambda which: metric([answers[i] for i in which], [wanted[i] for i in which])

    def _references(self, part: Split) -> list[list[str]]:
        """The answers of all rows of each prompt."""
        found: dict[int, list[Sample]] = {}
        for sample, unit in zip(part.samples, part.units, strict=True):
            assert isinstance(sample, Sample)
            found.setdefault(unit, []).append(sample)
        templated = self.base.recipe.task_type != "SEQ_2_SEQ_LM"
        groups = [found[unit] for unit in sorted(found)]
        return references(self.base.begun.tokenizer, groups, templated)


def _answers_path(record: Record) -> Path:
    return Path(record.configuration.recipe.output_dir) / ANSWERS_NAME


def _asked(part: Split) -> list[Sample]:
    """The first sample of each prompt."""
    first: dict[int, Sample] = {}
    for sample, unit in zip(part.samples, part.units, strict=True):
        assert isinstance(sample, Sample)
        first.setdefault(unit, sample)
    return [first[unit] for unit in sorted(first)]
