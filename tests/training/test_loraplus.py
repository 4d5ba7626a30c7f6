"""LoRA+ in a recipe: `B` learns as many times faster as is asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import lorakit
from lorakit import LoraLinear
from lorakit.errors import InputError
from lorakit.training.schedule import over_loraplus_groups
from small_runs import recipe, weights


def trained(model: Path, rows: Path, folder: Path, **training: Any) -> dict[str, torch.Tensor]:
    values = recipe(model, rows, folder, max_steps=1, max_grad_norm=0, warmup_steps=0, **training)
    values["data"]["eval"] = 0
    return weights(lorakit.train(values | {"samples": 0}, quiet=True).output_dir)


def test_b_learns_as_many_times_faster_than_a(tiny_model: Path, rows: Path, tmp_path: Path):
    plain = trained(tiny_model, rows, tmp_path / "plain", optim="sgd", learning_rate=1.0)
    plus = trained(
        tiny_model, rows, tmp_path / "plus", optim="sgd", learning_rate=1.0, loraplus_lr_ratio=16
    )
    for key, value in plain.items():
        # B starts at zero, so that after one step it is the step.
        torch.testing.assert_close(plus[key], value * (16 if "lora_B" in key else 1))


def test_an_optimiser_that_divides_the_parameters_itself_is_refused(tmp_path: Path):
    layer = LoraLinear(torch.nn.Linear(3, 3), r=2)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    own = {"params": list(layer.parameters())}  # as GaLore's are
    with pytest.raises(InputError, match=r"does not go with training.optim=adamw_torch_fused"):
        over_loraplus_groups(layer, args, 4.0, torch.optim.AdamW, own)
