"""Distillation: an adapter learns the next-token probabilities of a teacher on the same base.

Teacher and student are one resident model under two routes. The teacher is the bare base or another
adapter (`teacher`), behind a longer prompt (`system`) if there is one; the student is the adapter
that reads the row as it is. Both read the same answer, the row's or one that the student has
sampled at this step, and at each of its tokens the student's probabilities are drawn to the
teacher's. This is generalised knowledge distillation (Agarwal et al. 2024, arXiv:2306.13649), and
with `system` the context distillation of Askell et al. 2021 (arXiv:2112.00861) and Snell et al.
2022 (arXiv:2209.15189).
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from lorakit.data.batches import taken_from, under
from lorakit.data.masking import IGNORE, RowWithSecond, TokenizedRow, tokenized
from lorakit.data.samples import Sample
from lorakit.data.too_long import WHOLE, Limit
from lorakit.errors import InputError
from lorakit.models.divergence import chunked, generalized_jsd
from lorakit.models.load import positions_of
from lorakit.models.loss import SupervisedLoss
from lorakit.objectives import settings as kinds
from lorakit.objectives.batch_sums import Loss
from lorakit.objectives.forward import BASE, TEACHER, Forward
from lorakit.objectives.objective import Batch, Collate, Objective
from lorakit.objectives.rollout import AskedPrompt, Sampling

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.dataset import PreparedData
    from lorakit.models.load import LoadedModel
    from lorakit.objectives.objective import TrainingInputs
    from lorakit.objectives.run_request import RunRequest


_TEACHER = "teacher."
_IDS, _LENGTHS = "asked.ids", "asked.lengths"
"""Of a batch: the prompts of its rows, each as the student and as the teacher reads it, one after
the other; and their lengths (rows, 2)."""

_ANYTHING = "."
"""Stands for an answer that is still to be sampled, where the template has to write one."""


class Distill(Objective):
    """The divergence from the teacher's next-token probabilities, by answer token.

    Held-out scores: `kl`, the forward KL(teacher | student) in nats a token, and `agreement`, the
    share of tokens at which both have the same likeliest one.
    """

    name = "distill"
    unit = "answer token"
    row_kinds = ("conversation", "prompt")
    score_names = ("kl", "agreement")
    lower_is_better = ("kl",)
    row_settings: ClassVar[Sequence[str]] = (
        *("teacher", "system", "lmbda", "seq_kd", "max_new_tokens", "seed"),
    )
    compares_with_start = False

    class Settings(kinds.Settings):
        """TRL's names and defaults (`GKDConfig`), and who the teacher is.

        Attributes:
            teacher: the folder of the adapter that is learned from; None for the bare base.
            system: text in front of the teacher's system message.
            beta: 0 is the forward KL, 1 the reverse KL, between them the generalised
                Jensen-Shannon divergence.
            lmbda: the probability with which the answers of an optimizer step are sampled from the
                student.
            temperature: of these answers, and what the logits of both are divided by (as in TRL's
                `DistillationTrainer`; its `GKDTrainer` samples with it and no more).
            top_k: compare the teacher's so many likeliest tokens, and the others as one.
            max_new_tokens: of answers that are sampled.
            seq_kd: the teacher answers the prompts to learn from, whatever answers they have;
                once before the first step, at the temperature 1.
            seed: of sampling.
        """

        teacher: str | None = None
        system: str = ""
        beta: Annotated[float, Field(ge=0, le=1)] = 0.5
        lmbda: Annotated[float, Field(ge=0, le=1)] = 0.5
        temperature: Annotated[float, Field(gt=0, le=100)] = 0.9
        top_k: Annotated[int, Field(ge=1)] | None = None
        max_new_tokens: Annotated[int, Field(ge=1, le=2**20)] = 128
        seq_kd: bool = False
        seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.reference = BASE if self.teacher is None else TEACHER
        self._limit = Limit(WHOLE)

    @property
    def teacher(self) -> str | None:
        """As in `Objective`."""
        folder: str | None = self.settings.teacher
        return folder

    # --- rows -------------------------------------------------------------------------------

    def prepare(self, request: RunRequest) -> TrainingInputs:
        """As in `Objective`. Raises InputError where teacher and student are the same."""
        if self.teacher is None and not self.settings.system and request.start is None:
            raise InputError(
                "objective distill: the student begins as the bare base, which is its own teacher, "
                "so that there is nothing to learn: give objective.teacher (an adapter's folder) "
                "or objective.system (a text that the teacher reads first)"
            )
        return super().prepare(request)

    def read(self, request: RunRequest, loaded: LoadedModel) -> PreparedData:
        """As in `Objective`; how long answers may become is noted."""
        self._limit = Limit(request.max_length, positions_of(loaded.model))
        return super().read(request, loaded)

    def complete(
        self, samples: Sequence[Sample], held_out: bool, request: RunRequest, loaded: LoadedModel
    ) -> list[Sample]:
        """The samples, with the teacher's answers in those that are to have them.

        Those are, with `seq_kd`, the ones to learn from, and held-out ones without an answer, which
        are then measured on the same answers whenever they are.
        """
        all_of_them = self.settings.seq_kd and not held_out
        waiting = [i for i, sample in enumerate(samples) if all_of_them or not sample.reference]
        if not waiting or (self.settings.lmbda == 1 and not held_out):
            return list(samples)
        if not held_out and not all_of_them:
            raise InputError(
                f"{samples[waiting[0]].where}: has no answer, and objective.lmbda is below 1: "
                "give it one, set objective.lmbda=1.0 (the student samples all answers) or "
                "objective.seq_kd=true (the teacher answers)"
            )
        if request.answer is None:
            raise InputError(f"{samples[waiting[0]].where}: has no answer to learn")
        tokenizer, most = loaded.tokenizer, self._limit.tokens
        waiting = [
            i
            for i in waiting  # others are too long, and left out
            if not self._tokenize_prompt(samples[i], tokenizer, most).truncated
        ]
        asked = [self.for_teacher(samples[i]) for i in waiting]
        limits = (self.settings.max_new_tokens, self.settings.seed, self.teacher)
        completed = list(samples)
        answers = request.answer(loaded.model, tokenizer, asked, *limits)
        for i, answer in zip(waiting, answers, strict=True):
            if not answer:
                raise InputError(f"{samples[i].where}: the teacher's answer is empty: drop the row")
            *_, last = samples[i].learned
            own = {"role": "assistant", "content": answer}
            completed[i] = replace(samples[i], messages=(*samples[i].messages[:last], own))
        return completed

    def tokenize(
        self, sample: Sample, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> TokenizedRow:
        """The student's row, and the teacher's beside it with the same answer tokens.

        Of a sample without an answer it is the prompt, and no token is learned. Where nothing to
        learn is left before the cut, there is no teacher's row.

        Raises:
            InputError: the chat template writes the answer otherwise behind the longer prompt, or
                that is too long for the model.
        """
        if sample.learned and not sample.reference:
            return self._tokenize_prompt(sample, tokenizer, max_length)
        row = tokenized(sample, tokenizer, max_length)
        if not row.supervised:
            return row  # which is cut before its answer and left out
        taught = tokenized(self.for_teacher(sample), tokenizer, sys.maxsize)
        at = [i for i, label in enumerate(taught.labels) if label != IGNORE][: row.supervised]
        if [taught.labels[i] for i in at] != [x for x in row.labels if x != IGNORE]:
            raise InputError(
                f"{row.where}: behind the teacher's prompt the chat template writes the answer "
                "otherwise, so that its tokens cannot be compared"
            )
        end = at[-1] + 1
        self._require_room(end, row.where)
        return RowWithSecond.of(
            row, TokenizedRow(taught.input_ids[:end], taught.labels[:end], row.where)
        )

    def _tokenize_prompt(
        self, sample: Sample, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> TokenizedRow:
        last = sample.learned[-1]
        own = {"role": "assistant", "content": _ANYTHING}
        asked = replace(sample, messages=(*sample.messages[:last], own))
        row = tokenized(asked, tokenizer, sys.maxsize)
        prompt = row.input_ids[: _last_answer(row)]
        if len(prompt) >= max_length:  # no room for an answer
            cut = len(prompt) + 1 - max_length
            ids = prompt[:max_length]
            return TokenizedRow(ids, [IGNORE] * len(ids), row.where, cut)
        taught = tokenized(self.for_teacher(asked), tokenizer, sys.maxsize)
        longer = taught.input_ids[: _last_answer(taught)]
        self._require_room(len(longer) + 1, row.where)
        first, second = (
            TokenizedRow(ids, [IGNORE] * len(ids), row.where) for ids in (prompt, longer)
        )
        return RowWithSecond.of(first, second)

    def _require_room(self, tokens: int, where: str) -> None:
        """Raises InputError where the teacher's row is longer than the model reads."""
        if self._limit.positions and tokens > self._limit.positions:
            raise InputError(
                f"{where}: with the teacher's prompt the row has {tokens:,} tokens, and the model "
                f"reads {self._limit.positions:,}: shorten objective.system or the row"
            )

    def for_teacher(self, sample: Sample) -> Sample:
        """The sample as the teacher reads it: behind `system`."""
        if not self.settings.system:
            return sample
        first, *rest = sample.messages
        shift, text = 1, self.settings.system
        if first["role"] == "system":
            shift, text = 0, f"{text}\n\n{first['content']}"
        else:
            rest = [first, *rest]
        unlearned = frozenset(i + shift for i in sample.unlearned)
        messages = ({"role": "system", "content": text}, *rest)
        return replace(sample, messages=messages, unlearned=unlearned)

    def to_batch(self, rows: Sequence[TokenizedRow], collate: Collate) -> dict[str, torch.Tensor]:
        """The student's tensors, the teacher's under names that begin with `teacher.`, prompts."""
        pairs = [(row, row.second) for row in rows if isinstance(row, RowWithSecond)]
        batch = collate(rows) | under(_TEACHER, collate([second for _, second in pairs]))
        return batch | (_prompts(pairs) if self.on_policy else {})

    # --- answers of the student -------------------------------------------------------------

    @property
    def on_policy(self) -> bool:
        """Whether there are answers of the student."""
        return bool(self.settings.lmbda > 0)

    def sampled_rows(self, batches: Sequence[Batch], step: int | None) -> Sampling:
        """As in `Objective`; all tokens of the answers are learned."""
        assert step is not None
        asked = [self.asked(batch, step) for batch in batches]
        rollouts = yield [prompt for several in asked for prompt in several]
        answers = iter(rollouts)
        return [
            _answered(batch, [next(answers).tokens for _ in own]) if own else None
            for batch, own in zip(batches, asked, strict=True)
        ]

    def asked(self, batch: Batch, step: int) -> list[AskedPrompt]:
        """The prompts of all rows with the probability `lmbda`, else none.

        What is drawn depends on `seed`, the step and the prompt alone: a step is the same however
        it is divided into batches, and a resumed run draws the same.
        """
        place = f"{self.settings.seed} {step}"
        if random.Random(place).random() >= self.settings.lmbda:
            return []
        times: Counter[tuple[int, ...]] = Counter()
        most, limit = self.settings.max_new_tokens, self._limit
        found = []
        for own, longer in _pairs_of(batch):
            room = limit.tokens - len(own)
            if limit.positions:
                room = min(room, limit.positions - len(longer))
            times[tuple(own)] += 1  # the same prompt again gets another answer
            seed = random.Random(f"{place} {times[tuple(own)]} {own}").getrandbits(32)
            found.append(AskedPrompt(own, max(1, min(most, room)), self.settings.temperature, seed))
        return found

    # --- loss -------------------------------------------------------------------------------

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The divergence summed over answer tokens; the teacher's pass keeps no graph."""
        import torch

        reader = forward.reader
        assert isinstance(reader, SupervisedLoss)
        with torch.no_grad():
            taught, wanted = forward.states(taken_from(batch, _TEACHER), self.reference)
        learned, targets = forward.states(batch)
        assert torch.equal(targets, wanted)  # `tokenize` has seen to it
        settings, training = self.settings, forward.training
        sums: dict[str, torch.Tensor] = {}

        def divergence(h: torch.Tensor, part: slice) -> torch.Tensor:
            student = reader.logits(h)
            with torch.no_grad():
                teacher = reader.logits(taught[part])
                found = {"agreement": (student.argmax(-1) == teacher.argmax(-1)).sum()}
                if not training:
                    found["kl"] = generalized_jsd(student, teacher, 0).sum()
                for name, value in found.items():
                    sums[name] = sums.get(name, 0) + value.double()
            t = settings.temperature
            return generalized_jsd(student / t, teacher / t, settings.beta, settings.top_k)

        total = chunked(learned, divergence, reader.classes(learned)).sum()
        return Loss(total, len(targets), sums)


# --- the prompts of rows --------------------------------------------------------------------------


def _last_answer(row: TokenizedRow) -> int:
    """Where the last answer that is learned begins; the end of a prompt without one."""
    end = next((i for i in range(len(row), 0, -1) if row.labels[i - 1] != IGNORE), None)
    if end is None:
        return len(row)
    return next((i for i in range(end, 0, -1) if row.labels[i - 1] == IGNORE), 0)


def _prompts(pairs: Sequence[tuple[TokenizedRow, TokenizedRow]]) -> dict[str, torch.Tensor]:
    import torch

    both = [row.input_ids[: _last_answer(row)] for pair in pairs for row in pair]
    return {
        _IDS: torch.tensor([token for prompt in both for token in prompt]),
        _LENGTHS: torch.tensor([len(prompt) for prompt in both]).view(-1, 2),
    }


def _pairs_of(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The prompts of a batch's rows, as the student and as the teacher reads them."""
    parts = [part.tolist() for part in batch[_IDS].split(batch[_LENGTHS].flatten().tolist())]
    return list(zip(parts[::2], parts[1::2], strict=True))


def _answered(batch: Batch, answers: Sequence[Sequence[int]]) -> list[TokenizedRow]:
    """The rows with these answers, of which all tokens are learned."""
    return [
        RowWithSecond.of(
            *(
                TokenizedRow([*prompt, *answer], [IGNORE] * len(prompt) + [*answer], "sampled")
                for prompt in pair
            )
        )
        for pair, answer in zip(_pairs_of(batch), answers, strict=True)
    ]
