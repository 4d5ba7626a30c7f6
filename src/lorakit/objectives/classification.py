"""One class for a text or a pair of texts: a new head is trained whole, beside the adapter.

The head needs the labels of the rows before it can be made, so that the rows are read first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lorakit.data.batches import LabelCollator
from lorakit.data.checks import findings
from lorakit.data.dataset import PreparedData
from lorakit.data.label_rows import LabelledRow, notice_unseen, tokenize_sequence
from lorakit.data.labelled import (
    LabelledSample,
    collect_labels,
    hold_out,
    notice_labels,
    read_labelled,
)
from lorakit.data.mixing import DataFacts, Source, notice_of_own
from lorakit.data.scores import LabelScorer
from lorakit.data.sources import read_source
from lorakit.data.splits import HELD_OUT, LEARNED
from lorakit.data.too_long import Limit, fit
from lorakit.errors import InputError, listed
from lorakit.models.load import positions_of
from lorakit.models.loss import IGNORE, LabelLoss
from lorakit.objectives.batch_sums import Loss
from lorakit.objectives.objective import Batch, Objective, TrainingInputs

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.objectives.forward import Forward
    from lorakit.objectives.run_request import RunRequest


class Classification(Objective):
    """A class for each row.

    Attributes:
        words: each word of a row has a class of its own.
        scorer: what held-out rows are scored by; there is one when the rows have been read.
    """

    name = "classification"
    task_type = "SEQ_CLS"
    unit = "row"
    templated = False
    packable = False
    answers = False
    recommended_for = "classification"
    words: ClassVar[bool] = False
    to_row: ClassVar[Callable[..., LabelledRow]] = staticmethod(tokenize_sequence)
    scorer: LabelScorer

    def prepare(self, request: RunRequest) -> TrainingInputs:
        """Reads the rows, then loads the model with a head for their labels."""
        train, held, facts, notices = labelled_samples(request, self.task_type)
        labels = collect_labels(train, held)
        notices += notice_labels(labels, len(train))
        base = request.load(self.task_type, labels.names)
        loaded = base.loaded
        notices += base.notices
        notices.append(
            f"trained whole and saved with the adapter: {listed(loaded.new_modules)} "
            f"({self.task_type})"
        )
        tokenizer, number_of = loaded.tokenizer, labels.number_of
        limit = Limit(request.max_length, positions_of(loaded.model))
        fitted = fit(
            train,
            held,
            lambda length: [self.to_row(s, tokenizer, length, number_of) for s in (*train, *held)],
            limit,
            request.too_long,
        )
        notices += notice_unseen([row for _, row in (*fitted.train, *fitted.eval)])
        data = PreparedData(
            [row for _, row in fitted.train],
            [row for _, row in fitted.eval],
            [sample for sample, _ in fitted.train],
            [sample for sample, _ in fitted.eval],
            facts,
            notices,
            findings(fitted.train, fitted.eval, tokenizer, limit, fitted.left_out),
        )
        self.labels, self.scorer = labels, LabelScorer(labels.names, words=self.words)
        self.score_names = self.scorer.metrics
        collator = self.collator(tokenizer)
        return TrainingInputs(
            loaded.model,
            tokenizer,
            data,
            self,
            collator,
            loaded.new_modules,
            base_fingerprint=base.fingerprint,
            start=request.start,
            own_tokenizer=base.own_tokenizer,
            token_rows=base.token_rows,
        )

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> LabelCollator:
        """Pads rows, each with its class or the tags of its words."""
        return LabelCollator(int(tokenizer.pad_token_id), one_label=not self.words)

    def reader(self, model: nn.Module, own_logits: bool) -> LabelLoss:
        """Cross-entropy of the classes."""
        return LabelLoss(model)

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The summed negative log-likelihood of the labels, in nats; held-out rows are counted."""
        total, logits = forward.label_logits(batch)
        count = self.count(batch)
        if forward.training:
            return Loss(total, count)
        found = self.scorer.count(logits.argmax(-1), batch["labels"])
        return Loss(total, count, {"counts": found})

    def supervised(self, batch: Batch) -> torch.Tensor:
        """The labels."""
        return (batch["labels"] != IGNORE).sum()

    def scores(self, sums: Mapping[str, torch.Tensor], count: float) -> dict[str, float]:
        """Accuracy, macro F1, and F1 of whole entities for BIO tags."""
        return self.scorer.scores(sums["counts"]) if sums else {}


def labelled_samples(
    request: RunRequest, task_type: str
) -> tuple[list[LabelledSample], list[LabelledSample], list[DataFacts], list[str]]:
    """Training and held-out samples, what they were read from, and notices."""
    own: list[Source] = []
    notices: list[str] = []

    def read(sources: Any, key: str) -> tuple[list[LabelledSample], list[DataFacts]]:
        given = sources if isinstance(sources, list) else [sources]
        samples: list[LabelledSample] = []
        facts = []
        for source in given:
            part = source if isinstance(source, Source) else Source(str(source))
            if part.weight != 1:
                raise InputError(
                    f"{key}: {part.path} has a weight, which only causal language models and "
                    "SEQ_2_SEQ_LM learn by; remove it"
                )
            columns = part.columns if part.columns is not None else request.columns
            wanted = LEARNED if key == "data.train" else HELD_OUT
            contents = read_source(part.path, full_names=len(given) > 1, wanted=wanted)
            if contents.held_out:
                own.append(Source(contents.held_out, columns=part.columns))
            found = read_labelled(contents.rows, task_type, columns, request.limit)
            samples += found
            facts.append(DataFacts(part.path, len(found), contents.sha256))
            notices.extend(contents.notices)
        return samples, facts

    samples, facts = read(request.train, "data.train")
    held_out = request.eval
    if isinstance(held_out, (int, float)) and held_out and own:
        notices.append(notice_of_own(own))
        held_out = list(own)
    if isinstance(held_out, (int, float)):
        train, held, said = hold_out(samples, held_out, request.data_seed)
        return train, held, facts, [*notices, *said]
    held, held_facts = read(held_out, "data.eval")
    return samples, held, facts + held_facts, notices
