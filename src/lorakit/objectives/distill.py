"""Distillation: an adapter learns to answer without a prompt as the base answers with it.

Teacher and student are one resident model. The teacher is the bare base that reads a longer prompt
(`system`), the student the adapter that reads the row as it is; both read the same answer, and at
each of its tokens the student's probabilities are drawn to the teacher's. This is the context
distillation of Askell et al. 2021 (arXiv:2112.00861) and Snell et al. 2022 (arXiv:2209.15189), with
the divergences of generalised knowledge distillation (Agarwal et al. 2024, arXiv:2306.13649).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from lorakit.data.batches import taken_from, under
from lorakit.data.masking import IGNORE, RowWithSecond, TokenizedRow, tokenize
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.models.divergence import chunked, generalized_jsd
from lorakit.models.loss import SupervisedLoss
from lorakit.objectives import objective as contract
from lorakit.objectives.forward import BASE, Forward
from lorakit.objectives.objective import Batch, Collate, Loss, Objective

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from lorakit.models.load import LoadedModel
    from lorakit.objectives.run_request import RunRequest


_TEACHER = "teacher."


class Distill(Objective):
    """The divergence from the teacher's next-token probabilities, by answer token.

    Held-out scores: `kl`, the forward KL(teacher | student) in nats a token, and `agreement`, the
    share of tokens at which both have the same likeliest one.
    """

    name = "distill"
    unit = "answer token"
    row_kinds = ("conversation", "prompt")
    score_names = ("kl", "agreement")
    row_settings: ClassVar[Sequence[str]] = ("system", "max_new_tokens", "seed")

    class Settings(contract.Settings):
        """TRL's names (`GKDConfig`), and `system`, what the teacher reads and the student does not.

        Attributes:
            system: text in front of the teacher's system message.
            beta: 0 is the forward KL, 1 the reverse KL, between them the generalised
                Jensen-Shannon divergence.
            temperature: what the logits of both are divided by.
            top_k: compare the teacher's so many likeliest tokens, and the others as one.
            max_new_tokens: of the answers that the teacher gives to rows which have none.
            seed: of those answers; they are sampled at the temperature 1.
        """

        system: str = ""
        beta: Annotated[float, Field(ge=0, le=1)] = 0.5
        temperature: Annotated[float, Field(gt=0, le=100)] = 0.9
        top_k: Annotated[int, Field(ge=1)] | None = None
        max_new_tokens: Annotated[int, Field(ge=1, le=2**20)] = 128
        seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    # --- rows -------------------------------------------------------------------------------

    def complete(
        self, samples: Sequence[Sample], request: RunRequest, loaded: LoadedModel
    ) -> list[Sample]:
        """The samples, with the teacher's own answers in those that have none."""
        waiting = [i for i, sample in enumerate(samples) if not sample.reference]
        if not waiting:
            return list(samples)
        if request.answer is None:
            raise InputError(f"{samples[waiting[0]].where}: has no answer to learn")
        asked = [self.for_teacher(samples[i]) for i in waiting]
        limits = (self.settings.max_new_tokens, self.settings.seed)
        completed = list(samples)
        answers = request.answer(loaded.model, loaded.tokenizer, asked, *limits)
        for i, answer in zip(waiting, answers, strict=True):
            if not answer:
                raise InputError(f"{samples[i].where}: the teacher's answer is empty: drop the row")
            *prompt, last = samples[i].messages
            completed[i] = replace(samples[i], messages=(*prompt, last | {"content": answer}))
        return completed

    def tokenize(
        self, sample: Sample, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> TokenizedRow:
        """The student's row, and the teacher's beside it with the same answer tokens.

        Raises:
            InputError: the chat template writes the answer otherwise behind the longer prompt.
        """
        row = tokenize(sample, tokenizer, max_length)
        taught = tokenize(self.for_teacher(sample), tokenizer, sys.maxsize)
        at = [i for i, label in enumerate(taught.labels) if label != IGNORE][: row.supervised]
        if [taught.labels[i] for i in at] != [x for x in row.labels if x != IGNORE]:
            raise InputError(
                f"{row.where}: behind the teacher's prompt the chat template writes the answer "
                "otherwise, so that its tokens cannot be compared"
            )
        end = at[-1] + 1
        return RowWithSecond.of(
            row, TokenizedRow(taught.input_ids[:end], taught.labels[:end], row.where)
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
        """The student's tensors, and the teacher's under names that begin with `teacher.`."""
        taught = collate([row.second for row in rows if isinstance(row, RowWithSecond)])
        return collate(rows) | under(_TEACHER, taught)

    # --- loss -------------------------------------------------------------------------------

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The divergence summed over answer tokens; the teacher's pass keeps no graph."""
        import torch

        reader = forward.reader
        assert isinstance(reader, SupervisedLoss)
        with torch.no_grad():
            taught, wanted = forward.states(taken_from(batch, _TEACHER), BASE)
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
