"""What the monitor says is what the formulas give, alone and as a Trainer's callback."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import lorakit
from lorakit import LoraConfig, LoraModel, LoraMonitor
from lorakit.errors import InputError


@pytest.fixture
def model(tiny_model: Path) -> LoraModel:
    base, _ = lorakit.load_model(tiny_model, "float32")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return lorakit.get_peft_model(base, config)


def step(model: LoraModel) -> None:
    ids = torch.arange(24).view(2, 12)
    model(input_ids=ids, labels=ids).loss.backward()


def test_every_value_is_the_norm_that_its_name_says(model: LoraModel):
    # An adapter that is not zero at the start: what counts is the change.
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    monitor = LoraMonitor(model)
    path = "model.layers.1.mlp.down_proj"
    layer = model.get_base_model().get_submodule(path)
    before = layer.get_delta_weight("default").clone()
    start = [p.detach().clone() for p in layer.factors("default")]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    step(model)
    optimizer.step()
    found = monitor.measure()[path]
    A, B = layer.factors("default")
    assert found.gradient_norm == pytest.approx(
        torch.cat([A.grad.flatten(), B.grad.flatten()]).norm().item(), rel=1e-5
    )
    moved = torch.cat([(A - start[0]).flatten(), (B - start[1]).flatten()]).norm().item()
    assert found.weight_change == pytest.approx(moved, rel=1e-5)
    update = (layer.get_delta_weight("default") - before).norm().item()
    assert found.update_norm == pytest.approx(update, rel=1e-4)
    weight = layer.base_layer.weight.norm().item()
    assert found.relative_update == pytest.approx(update / weight, rel=1e-4)


def test_all_modules_together_are_the_root_of_the_sum_of_squares(model: LoraModel):
    monitor = LoraMonitor(model)
    assert monitor.total().gradient_norm == 0
    step(model)
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    expected = torch.cat([g.flatten() for g in trained]).norm().item()
    assert monitor.total().gradient_norm == pytest.approx(expected, rel=1e-5)
    assert monitor.total().weight_change == 0
    assert len(monitor.measure()) == 14


def test_it_is_a_callback_for_a_plain_trainer(model: LoraModel, tmp_path: Path):
    monitor = LoraMonitor()
    ids = torch.arange(12)
    rows = [{"input_ids": ids + n, "labels": ids + n} for n in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        logging_steps=2,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[monitor]).train()
    assert [step for step, _, _ in monitor.history] == [2, 4]
    first, last = (total for _, _, total in monitor.history)
    assert last.gradient_norm > 0
    assert last.update_norm > first.update_norm > 0


def test_a_model_without_an_adapter_is_refused(model: LoraModel):
    with pytest.raises(InputError, match="active adapter"):
        LoraMonitor(model.unload())
