"""The table of settings to begin with."""

import pytest
import torch
from torch import nn

from lorakit import recommended_config


@pytest.mark.parametrize(
    ("task", "size", "r"),
    [
        ("classification", "small", 8),
        ("classification", "medium", 16),
        ("classification", "large", 32),
        ("generation", "small", 16),
        ("generation", "medium", 32),
        ("generation", "large", 64),
        ("complex_reasoning", "small", 32),
        ("complex_reasoning", "medium", 64),
        ("complex_reasoning", "large", 128),
        ("generation", 135_000_000, 16),
        ("generation", 7_000_000_000, 32),
        ("generation", 70_000_000_000, 64),
        (None, None, 16),
    ],
)
def test_the_table_is_that_of_the_document(task, size, r):
    config = recommended_config(task, size)
    assert (config.r, config.lora_alpha) == (r, 2 * r)
    assert config.task_type == ("SEQ_CLS" if task == "classification" else "CAUSAL_LM")


def test_the_size_is_read_off_a_model():
    with torch.device("meta"):
        assert recommended_config("generation", nn.Linear(10, 10)).r == 16
        assert recommended_config("generation", nn.Linear(60_000, 60_000)).r == 32


def test_what_is_unknown_gives_the_default_and_a_warning():
    with pytest.warns(UserWarning, match="no 'clasification' \\(did you mean 'classification'"):
        config = recommended_config("clasification", "large")
    assert (config.r, config.lora_alpha) == (16, 32)
    with pytest.warns(UserWarning, match="no 'huge'"):
        assert recommended_config("generation", "huge").r == 16
