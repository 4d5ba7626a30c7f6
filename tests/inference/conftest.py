"""A model without adapters, and the same with two."""

from typing import Any

import pytest
import torch

from lorakit.lora import LoraConfig, LoraModel


@pytest.fixture
def plain(attentive_model: Any) -> Any:
    """The model without adapters."""
    return attentive_model


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
