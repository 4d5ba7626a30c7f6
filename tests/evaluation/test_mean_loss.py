"""The mean loss: per supervised token over all rows, whatever the batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.data.formats import to_sample
from lorakit.data.masking import tokenize
from lorakit.data.samples import Sample
from lorakit.data.sources import Row
from lorakit.errors import InputError
from lorakit.evaluation.held_out import (
    batch_losses,
    collator_of,
    held_out_scores,
    longest_first,
    mean_loss,
    rows_of,
)
from lorakit.lora import LoraModel
from lorakit.objectives.batch_sums import added
from lorakit.objectives.registry import make_objective


@pytest.fixture
def samples(sample: Callable[..., Sample]) -> list[Sample]:
    # Answers of very different lengths: a mean of row or batch means would be another number.
    pairs = (("a", "b"), ("how?", "a long answer " * 6), ("why", "yes"), ("x" * 50, "?"))
    return [sample(*pair) for pair in pairs]


def test_the_loss_is_one_sum_over_one_count(
    model: Any, tokenizer: Any, samples: list[Sample]
) -> None:
    total, count = 0.0, 0
    with torch.no_grad():
        for row in (tokenize(s, tokenizer, 512) for s in samples):
            log_p = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            for at, label in enumerate(row.labels[1:]):
                if label != -100:
                    total -= log_p[at, label].item()
                    count += 1
    for batch_size in (1, 3, 8):
        loss = mean_loss(model, tokenizer, samples, 512, batch_size)
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_progress_counts_rows_and_the_training_mode_stays(
    model: Any, tokenizer: Any, samples: list[Sample]
) -> None:
    model.train()
    counts: list[int] = []
    mean_loss(model, tokenizer, samples, 512, 3, on_batch=counts.append)
    assert counts == [3, 1]
    assert model.training


def test_plain_text_has_a_loss_too(model: Any, tokenizer: Any) -> None:
    assert mean_loss(model, tokenizer, [Sample((), "some text", "t:1")]) > 0


def test_no_rows_have_no_loss(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no rows"):
        mean_loss(model, tokenizer, [])


def test_pairs_in_lines_have_the_scores_of_padded_ones_and_fewer_tokens(
    tuned: LoraModel, tokenizer: Any
) -> None:
    tuned.double()
    objective = make_objective("dpo")
    rows = []
    for n in range(5):
        row = {"prompt": "why? " * (9 - n), "chosen": "yes" * (1 + 3 * n), "rejected": "no"}
        sample = to_sample(Row(row, Path("pairs"), n), {}, objective.row_kinds)
        rows += rows_of(objective, tokenizer, [sample], 512)
    widths: list[int] = []

    def note(module: Any, inputs: Any, given: dict[str, Any]) -> None:
        widths.append(given["input_ids"].numel())

    hook = tuned.get_base_model().register_forward_pre_hook(note, with_kwargs=True)
    padded = longest_first(rows, 3), collator_of(objective, tokenizer)
    sums: Any = {}
    for _, loss in batch_losses(objective, tuned, rows, *padded):
        sums = added(sums, loss.sums())
    wanted, of_padded = objective.held_out(sums), sum(widths)
    for batch_size in (1, 3, 8):
        widths.clear()
        found = held_out_scores(objective, tuned, tokenizer, rows, batch_size)
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    hook.remove()
    assert sum(widths) < of_padded / 2
