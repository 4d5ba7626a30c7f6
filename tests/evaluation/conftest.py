"""A tiny model whose answers depend on every token of the prompt, and its tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.data.formats import Sample
from lorakit.lora import LoraConfig, LoraModel
from tiny import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)  # as initialised, its attention is almost uniform
    return model


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
