"""What is watched while a run goes on: measurements, warnings with a cure, early stopping."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.adapters.manifest import read_manifest
from lorakit.adapters.open import open_adapter
from lorakit.training.monitor import AdapterState
from lorakit.training.watch import _of_gradients, _of_held_out, _of_movement
from small_runs import lines, recipe


def test_a_run_is_measured_at_every_logged_step_and_the_last_is_the_adapter_that_it_leaves(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=6, logging_steps=2)
    lorakit.train(values, quiet=True)
    first, *measured = lines(tmp_path / "run" / "monitor.jsonl")
    assert [line["step"] for line in measured] == [2, 4, 6]
    opened = open_adapter(tmp_path / "run", dtype="float32")
    for i, name in enumerate(first["modules"]):
        layer = opened.model.get_base_model().get_submodule(name)
        update = layer.get_delta_weight("default").norm().item()
        assert measured[-1]["update_norm"][i] == pytest.approx(update, rel=1e-3)
        assert first["weight_norm"][i] == pytest.approx(layer.base_weight.norm().item(), rel=1e-3)
        assert measured[0]["gradient_norm"][i] > 0


def test_a_resumed_run_measures_against_the_same_start(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    even = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole, halves = (
        recipe(tiny_model, rows, tmp_path / name, max_steps=6, save_steps=3, **even)
        for name in ("whole", "halves")
    )
    lorakit.train(whole, quiet=True)
    lorakit.train(halves | {"training": halves["training"] | {"max_steps": 3}}, quiet=True)
    lorakit.train(halves, resume=True, accept_changes=True, quiet=True)
    one, two = (lines(tmp_path / name / "monitor.jsonl") for name in ("whole", "halves"))
    assert one == two


def test_a_learning_rate_of_almost_nothing_is_warned_of_once_with_a_cure(
    tiny_model: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=14, learning_rate=1e-12)
    lorakit.train(values)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(said) == 1
    assert "does not move" in said[0]
    assert "Raise training.learning_rate" in said[0]
    manifest = read_manifest(tmp_path / "run")
    assert manifest is not None
    [warned] = manifest.warnings
    assert (warned["warning"], warned["step"]) == ("still", 10)


def test_a_run_that_learns_by_heart_is_warned_of_and_can_be_stopped_early(
    tiny_model: Path, rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "what is 1 + 1?", "completion": "zzzz"}\n')
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=60, learning_rate=0.02)
    values["data"]["eval"] = str(held_out)
    values["training"] |= {"eval_strategy": "steps", "eval_steps": 3}
    lorakit.train(values)
    warned = [line for line in capfd.readouterr().err.splitlines() if "held-out loss has" in line]
    assert len(warned) == 1
    assert "early_stopping_patience=2" in warned[0]

    page = (tmp_path / "run" / "report.html").read_text()
    assert "the rows are being learned by heart" in page
    values["training"]["save_total_limit"] = 4
    values |= {"early_stopping_patience": 2, "output_dir": str(tmp_path / "stopped")}
    stopped = lorakit.train(values, quiet=True)
    losses = {
        line["step"]: line["eval_loss"]
        for line in lines(tmp_path / "stopped" / "metrics.jsonl")
        if "eval_loss" in line
    }
    best = min(losses, key=losses.__getitem__)
    end = stopped.manifest.steps
    assert end == best + 2 * 3 < 60
    assert stopped.eval_loss == pytest.approx(losses[best])

    # Cut off before its end, or in the evaluation behind it, it ends in the same place.
    for name, last in (("cut", end - 3), ("ended", end)):
        shutil.copytree(tmp_path / "stopped", tmp_path / name)
        (tmp_path / name / "lorakit.json").unlink()
        for checkpoint in (tmp_path / name).glob("checkpoint-*"):
            if int(checkpoint.name.rpartition("-")[2]) > last:
                shutil.rmtree(checkpoint)
        values["output_dir"] = str(tmp_path / name)
        resumed = lorakit.train(values, resume=True, quiet=True)
        assert (resumed.manifest.steps, resumed.eval_loss) == (end, stopped.eval_loss), name
        tensors = [tmp_path / n / "adapter_model.safetensors" for n in ("stopped", name)]
        assert tensors[0].read_bytes() == tensors[1].read_bytes()


def state(**values: float) -> AdapterState:
    usual = {"gradient_norm": 1.0, "weight_change": 1.0, "update_norm": 1.0, "weight_norm": 10.0}
    return AdapterState(**usual | values)


@pytest.mark.parametrize(
    ("warnings", "name"),
    [
        (_of_movement(10, state(gradient_norm=0.0)), "no gradient"),
        (_of_movement(10, state(update_norm=1e-7)), "still"),
        (_of_movement(9, state(update_norm=0.0)), None),
        (_of_movement(10, state(update_norm=1e-3)), None),
        (_of_gradients(20, 11.0, [1.0] * 5), "gradients explode"),
        (_of_gradients(20, 9.0, [1.0] * 5), None),
        (_of_gradients(20, 99.0, [1.0] * 4), None),
        (_of_held_out([(1, 2.0), (2, 2.1), (3, 2.2), (4, 2.3)]), "held-out loss rises"),
        (_of_held_out([(1, 2.0), (2, 2.1), (3, 2.2)]), None),
        (_of_held_out([(1, 2.0), (2, 2.1), (3, 2.2), (4, 2.2)]), None),
    ],
)
def test_each_warning_comes_when_it_should_and_not_before(warnings: Any, name: str | None):
    assert [warned.name for warned in warnings] == ([name] if name else [])


def test_watching_changes_no_weight(tiny_model: Path, rows: Path, tmp_path: Path):
    often, never = (
        lorakit.train(
            recipe(tiny_model, rows, tmp_path / str(every), logging_steps=every), quiet=True
        )
        for every in (1, 1000)
    )
    one, two = (r.output_dir / "adapter_model.safetensors" for r in (often, never))
    assert one.read_bytes() == two.read_bytes()


def test_a_tracker_that_trainer_knows_gets_the_losses(tiny_model: Path, rows: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = recipe(tiny_model, rows, tmp_path / "run", report_to="tensorboard")
    lorakit.train(values, quiet=True)
    [events] = (tmp_path / "run").rglob("events.out.tfevents.*")
    seen = EventAccumulator(str(events)).Reload()
    logged = {
        line["step"]: line["loss"]
        for line in lines(tmp_path / "run/metrics.jsonl")
        if "loss" in line
    }
    read = {event.step: event.value for event in seen.Scalars("train/loss")}
    assert read == pytest.approx(logged)
    assert torch.tensor(list(read.values())).isfinite().all()
