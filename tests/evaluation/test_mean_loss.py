"""The mean loss: per supervised token over all rows, whatever the batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakit.data.masking import tokenize
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.evaluation.held_out import mean_loss


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
