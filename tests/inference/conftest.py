"""A tiny model with two adapters, and its tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.lora import LoraConfig, LoraModel
from tiny import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def plain(tiny_folder: Path) -> Any:
    """The model without adapters, scaled so that its answers depend on every token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


@pytest.fixture
def model(plain: Any) -> LoraModel:
    """`plain` with the adapters `shop`, which is active, and `poet`, which answer differently."""
    config = LoraConfig(r=4, target_modules="all-linear")
    model = LoraModel(plain, config, "shop")
    model.add_adapter("poet", config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model
