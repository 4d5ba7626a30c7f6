"""Runs over rows that are read as they come: resumed to the row, and the same in two processes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from several_runs import in_two_processes

import lorakit
from kills import assert_resumes_to_the_same_bytes
from lorakit.errors import InputError
from lorakit.training.check import check
from lorakit.training.recipe import load_recipe
from small_runs import lines, recipe, weights

NAME = "adapter_model.safetensors"


@pytest.fixture
def make(tiny_model: Path, rows: Path, tmp_path: Path) -> Any:
    """Makes a recipe of six steps over a stream, with dropout."""

    def made(name: str, data: Any = (), **training: Any) -> Any:
        settings = {"per_device_train_batch_size": 4, "save_steps": 2} | training
        values = recipe(tiny_model, rows, tmp_path / name, **settings)
        values["lora"]["lora_dropout"] = 0.1
        values["data"] |= {"eval": 0, "streaming": True, "buffer_size": 10, **dict(data)}
        return values

    return made


def cut_back(folder: Path, step: int, into: Path) -> None:
    """A run as if it had been killed behind a checkpoint."""
    shutil.copytree(folder, into)
    for path in into.iterdir():
        if path.name not in (f"checkpoint-{step}", "lorakit-run.json", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("data", "training"),
    [
        # More than a pass over the rows.
        pytest.param({}, {"per_device_train_batch_size": 11}, marks=pytest.mark.exhaustive),
        ({"packing": True, "max_length": 40}, {"gradient_accumulation_steps": 3}),
        # Stops within long texts.
        pytest.param(
            {"columns": {"text": "prompt"}, "max_length": 12}, {}, marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_run_resumes_to_the_row_and_once_more(
    data: Any, training: Any, make: Any, tmp_path: Path
):
    values = make("run", data, save_total_limit=9, **training)
    if "columns" in data:
        values["objective"] = "pretrain"
    whole = lorakit.train(values, quiet=True).output_dir
    before = whole
    for step in (2, 4):
        again = tmp_path / f"resumed{step}"
        cut_back(before, step, again)
        lorakit.train(values | {"output_dir": str(again)}, resume=True, quiet=True)
        assert (again / NAME).read_bytes() == (whole / NAME).read_bytes()
        assert [x["step"] for x in lines(again / "metrics.jsonl")] == [
            x["step"] for x in lines(whole / "metrics.jsonl")
        ]
        before = again


def test_a_longer_run_goes_on_with_the_next_rows(make: Any, tmp_path: Path):
    steady = {"lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = lorakit.train(make("whole", max_steps=6, **steady), quiet=True).output_dir
    lorakit.train(make("run", max_steps=2, **steady), quiet=True)
    values = make("run", max_steps=6, **steady)
    lorakit.train(values, resume=True, accept_changes=True, quiet=True)
    assert (tmp_path / "run" / NAME).read_bytes() == (whole / NAME).read_bytes()


def test_a_step_over_all_rows_is_that_of_a_run_that_reads_them_first(make: Any, rows: Path):
    training = {"max_steps": 1, "per_device_train_batch_size": 48, "optim": "sgd"}
    found = []
    for name, data in (("stream", {"eval": str(rows)}), ("whole", {"eval": str(rows)})):
        values = make(name, data, **training, learning_rate=0.5) | {"dtype": "float64"}
        values["lora"]["lora_dropout"] = 0
        if name == "whole":
            del values["data"]["streaming"], values["data"]["buffer_size"]
        found.append(lorakit.train(values, quiet=True))
    streamed, whole = (weights(result.output_dir) for result in found)
    assert any("lora_B" in name and x.abs().max() > 1e-4 for name, x in whole.items())
    for name, tensor in whole.items():
        assert (tensor - streamed[name]).abs().max() < 1e-9, name
    assert found[0].eval_loss == pytest.approx(found[1].eval_loss, abs=1e-9)
    assert found[0].manifest.recipe["data"]["streaming"] is True
    assert "streaming" not in found[1].manifest.recipe["data"]


def test_check_looks_at_the_first_rows_and_forecasts_the_run(make: Any):
    found = check(load_recipe(make("run", max_steps=300)))
    assert found.forecast is not None
    assert found.forecast.steps == 300
    assert found.statistics["train"].rows == 48


@pytest.mark.parametrize(
    ("data", "training", "words"),
    [
        ({}, {"max_steps": -1}, "training.max_steps"),
        ({"eval": 0.1}, {}, "data.eval a file of its own"),
        ({"train": [{"path": "rows.jsonl", "weight": 2}]}, {}, "leave their weights out"),
        ({"streaming": False}, {}, "data.buffer_size has no effect"),
        ({}, {"dataloader_num_workers": 2}, "dataloader_num_workers"),
        ({"buffer_size": 0}, {}, "data.buffer_size"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    data: Any, training: Any, words: str, make: Any
):
    with pytest.raises(InputError, match=words):
        load_recipe(make("run", data, **training))


def test_what_needs_all_rows_is_refused(make: Any):
    with pytest.raises(InputError, match="objective kto needs all rows"):
        load_recipe(make("run") | {"objective": "kto"})
    with pytest.raises(InputError, match=r"leave data\.streaming out"):
        lorakit.sweep(make("run"), over={"lora.r": [2, 4]}, quiet=True)


@pytest.mark.exhaustive
def test_whenever_it_is_killed_it_resumes_to_the_bytes_of_an_undisturbed_run(make: Any):
    values = make("killed", {"packing": True, "max_length": 40}, max_steps=40, save_steps=1)
    assert_resumes_to_the_same_bytes(values)


@pytest.mark.exhaustive
def test_two_processes_read_rows_of_their_own_and_make_the_steps_of_one(make: Any, tmp_path: Path):
    def of(name: str, size: int) -> Any:
        plain = {"optim": "sgd", "learning_rate": 0.5}  # Adam would magnify rounding
        values = make(name, per_device_train_batch_size=size, max_steps=4, **plain)
        values["lora"]["lora_dropout"] = 0
        return values | {"dtype": "float64"}

    lorakit.train(of("one", 8), quiet=True)
    listed = tmp_path / "runs.json"
    listed.write_text(json.dumps([(of("two", 4), None), (of("resumed", 4), "two")]))
    in_two_processes(listed)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        assert (tensor - two[name]).abs().max() < 1e-9, name
    assert (tmp_path / "resumed" / NAME).read_bytes() == (tmp_path / "two" / NAME).read_bytes()
