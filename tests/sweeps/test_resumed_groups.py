"""Groups that stop and go on: at a share, in another runner, after kills; and what diverges."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

import lorakit
from kills import kill_until_done
from lorakit.adapters.open import open_adapter
from lorakit.data.dataset import load_samples
from lorakit.data.masking import tokenize
from lorakit.errors import InputError
from lorakit.evaluation.held_out import mean_loss
from lorakit.training.interrupt import StoppedError
from small_runs import lines, weights
from sweeps.shared_sweeps import configurations, distance, runner_for, small, solo

CHANGES = [
    {"lora.lora_dropout": 0.2, "training.per_device_train_batch_size": 5},
    {"lora.r": 2, "training.gradient_accumulation_steps": 2, "training.max_steps": 5},
]


def test_a_group_that_stopped_goes_on_to_the_weights_of_one_that_did_not(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base", max_steps=7) | {"dtype": "float64"}
    stopped = configurations(values, tmp_path / "stopped", CHANGES)
    half = runner_for(values).advance(stopped, 0.5)
    assert [(p.step, p.planned) for p in half.values()] == [(4, 7), (3, 5)]
    for configuration, progress in zip(stopped, half.values(), strict=True):
        folder = Path(configuration.recipe.output_dir)
        assert (folder / f"checkpoint-{progress.step}").is_dir()
        assert not (folder / "adapter_model.safetensors").exists()
    again = runner_for(values).advance(stopped, 0.5)
    assert [p.losses for p in again.values()] == [p.losses for p in half.values()]
    # One goes on in `lorakit train`, and one beside a stranger.
    lorakit.train(stopped[0].recipe, resume=True, quiet=True)
    stranger = configurations(values, tmp_path / "strange", [{}, {}, {"lora.r": 3}])[2]
    whole = runner_for(values).advance([stopped[1], stranger], 1.0)
    assert [step for step, _ in whole["c01"].train_losses] == [1, 2, 3, 4, 5]
    assert whole["c01"].seconds > half["c01"].seconds
    for configuration in stopped:
        own = weights(Path(configuration.recipe.output_dir))
        assert distance(own, solo(configuration, tmp_path / "solo")) < 1e-9


def test_a_configuration_that_diverges_is_dropped_alone(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base")
    wild = {"training.learning_rate": 1e30, "training.lr_scheduler_type": "constant"}
    sweep = configurations(values, tmp_path / "with", [{"lora.r": 2}, wild, {"lora.r": 5}])
    found = runner_for(values).advance(sweep, 1.0)
    assert found["c01"].losses == {}
    assert found["c01"].diverged in {
        f"the {what} is {value} at step {found['c01'].step + 1}"
        for what in ("loss", "norm of the gradient")
        for value in ("nan", "inf")
    }
    assert not (tmp_path / "with" / "c01" / "adapter_model.safetensors").exists()
    others = configurations(values, tmp_path / "without", [{"lora.r": 2}, wild, {"lora.r": 5}])
    runner_for(values).advance([others[0], others[2]], 1.0)
    for name in ("c00", "c02"):
        assert found[name].diverged is None
        own, wanted = (weights(tmp_path / folder / name) for folder in ("with", "without"))
        assert distance(own, wanted) < 1e-4


def test_weights_that_are_no_numbers_are_neither_saved_nor_gone_on_from(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base", max_steps=2)
    wild = {"training.learning_rate": 1e39, "training.lr_scheduler_type": "constant"}
    sweep = configurations(values, tmp_path, [wild | {"training.warmup_steps": 0}, {}])
    for _ in range(2):
        found = runner_for(values).advance(sweep, 0.5)
        assert found["c00"].diverged == "a weight is NaN or Inf at step 1"
        assert found["c01"].diverged is None
        assert not list((tmp_path / "c00").glob("checkpoint-*"))


def test_a_signal_stops_all_behind_a_step_with_checkpoints(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base", max_steps=5000, save_strategy="no")
    sweep = configurations(values, tmp_path, [{"lora.r": 2}, {"lora.r": 3}])

    def stop_when_it_has_begun() -> None:
        while not (tmp_path / "c01" / "metrics.jsonl").is_file():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_it_has_begun).start()
    with pytest.raises(StoppedError):
        runner_for(values, at_once=2).advance(sweep, 1.0)
    for name in ("c00", "c01"):
        [checkpoint] = (tmp_path / name).glob("checkpoint-*")
        assert int(checkpoint.name.rpartition("-")[2]) < 5000
    assert not [t for t in threading.enumerate() if t.name.startswith("part")]


def test_a_whole_run_leaves_an_adapter_with_the_losses_that_were_returned(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base")
    sweep = configurations(values, tmp_path / "sweep", [{"lora.r": 2}, {"lora.r": 5}])
    runner = runner_for(values)
    found = runner.advance(sweep, 1.0)
    samples = load_samples(values["data"]["eval"])
    _, tokenizer = lorakit.load_model(tiny_model)
    supervised = [tokenize(sample, tokenizer, 1024).supervised for sample in samples]
    for configuration in sweep:
        folder = Path(configuration.recipe.output_dir)
        opened = open_adapter(folder, dtype="float32")
        losses = found[configuration.name].losses["held"]
        assert [tokens for _, tokens in losses] == supervised
        mean = sum(nats for nats, _ in losses) / sum(supervised)
        wanted = mean_loss(opened.model, opened.tokenizer, samples)
        assert mean == pytest.approx(wanted, rel=1e-5)
        one = mean_loss(opened.model, opened.tokenizer, samples[3:4])
        assert losses[3][0] / losses[3][1] == pytest.approx(one, rel=1e-5)
        steps = [line["step"] for line in lines(folder / "metrics.jsonl") if "loss" in line]
        assert steps == [1, 2, 3, 4, 5, 6]
    assert not any("lora" in name for name, _ in runner.base.inputs.model.named_modules())


def test_another_recipe_in_a_folder_is_refused(tiny_model: Path, rows: Path, tmp_path: Path):
    values = small(tiny_model, rows, tmp_path / "base")
    runner_for(values).advance(configurations(values, tmp_path, [{"lora.r": 2}]), 0.2)
    with pytest.raises(InputError, match=r"lora.r was 2 and is 3"):
        runner_for(values).advance(configurations(values, tmp_path, [{"lora.r": 3}]), 0.2)


@pytest.mark.exhaustive
def test_whenever_a_group_is_killed_it_goes_on_to_the_weights_of_an_undisturbed_one(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    values = small(tiny_model, rows, tmp_path / "base", max_steps=40, save_steps=1)
    values["dtype"] = "float64"
    changes = [{"lora.lora_dropout": 0.1}, {"lora.r": 2, "training.max_steps": 20}]
    prepare = """
from pathlib import Path
from sweeps.shared_sweeps import configurations, runner_for
import lorakit.sweeps.group, lorakit.training.run
"""
    work = """
values, folder, changes = values
sweep = configurations(values, Path(folder), changes)
runner = runner_for(values)
runner.advance(sweep, 0.6)
runner.advance(sweep, 1.0)
"""
    arguments = [values, str(tmp_path / "killed"), changes]
    assert kill_until_done(prepare, work, arguments, seed=3, within=(0.4, 1.6)) >= 2
    undisturbed = configurations(values, tmp_path / "undisturbed", changes)
    runner_for(values).advance(undisturbed, 1.0)
    for name in ("c00", "c01"):
        own, wanted = (weights(tmp_path / way / name) for way in ("killed", "undisturbed"))
        assert distance(own, wanted) < 1e-12
        steps = [
            [line["step"] for line in lines(tmp_path / way / name / "metrics.jsonl")]
            for way in ("killed", "undisturbed")
        ]
        assert steps[0] == steps[1]
