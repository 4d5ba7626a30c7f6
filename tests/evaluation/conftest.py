"""A model, and the same with an adapter that changes it much."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakit.data.samples import Sample
from lorakit.lora import LoraConfig, LoraModel


@pytest.fixture
def model(attentive_model: Any) -> Any:
    return attentive_model


@pytest.fixture
def tuned(model: Any) -> LoraModel:
    """`model` with an adapter that changes it much."""
    tuned = LoraModel(model, LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return tuned


@pytest.fixture
def sample() -> Callable[..., Sample]:
    """Makes a sample of one question and its answer."""

    def make(question: str, answer: str) -> Sample:
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return Sample(turns, None, "rows.jsonl:1")

    return make
