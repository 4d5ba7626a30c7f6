from collections.abc import Callable

import pytest
import torch
from torch import nn

from families import FAMILIES


@pytest.fixture
def build() -> Callable[[str], nn.Module]:
    """`build("llama")`: always the same weights, biases random too, evaluation mode."""

    def make(family: str = "llama") -> nn.Module:
        torch.manual_seed(0)
        model = FAMILIES[family]().double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
        return model

    return make


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
