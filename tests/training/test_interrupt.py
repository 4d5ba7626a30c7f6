"""Ctrl-C and SIGTERM: the step is finished and saved, and the run goes on to the same bytes."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

import lorakit
from forked import forked_lorakit
from lorakit.cli.main import main
from matrix import few
from small_runs import lines, recipe


@pytest.mark.parametrize("number", few([signal.SIGINT, signal.SIGTERM], signal.SIGTERM))
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_to_the_same_bytes(
    number: int, tiny_model: Path, rows: Path, tmp_path: Path
):
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=400, save_steps=1000)
    path, said = tmp_path / "recipe.yaml", tmp_path / "err.txt"
    path.write_text(yaml.safe_dump(values))
    process = forked_lorakit(["train", path], said)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.is_alive(), said.read_text()
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(120)
    err = said.read_text()
    assert process.exitcode == 130, err
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert "error: stopped after step" in last
    assert "--resume" in last
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    assert f"after step {step} of 400" in last

    short = values | {"training": values["training"] | {"max_steps": step + 2}}
    lorakit.train(short, resume=True, accept_changes=True, quiet=True)
    assert [line["step"] for line in lines(tmp_path / "run/metrics.jsonl")][-1] == step + 2


def test_going_on_behind_a_stop_gives_the_bytes_of_an_undisturbed_run(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    stopped, whole = (
        recipe(tiny_model, rows, tmp_path / name, max_steps=30, save_steps=1000)
        for name in ("stopped", "whole")
    )

    def stop_soon() -> None:
        while not (tmp_path / "stopped" / "metrics.jsonl").exists():
            time.sleep(0.001)
        while len((tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()) < 5:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    # As in a terminal; a shell behind `&` may have set it to be ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=stop_soon).start()
    with pytest.raises(lorakit.errors.LorakitError, match="stopped after step") as error:
        lorakit.train(stopped, quiet=True)
    assert error.value.exit_code == 130
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    results = [lorakit.train(stopped, resume=True, quiet=True), lorakit.train(whole, quiet=True)]
    one, two = ((r.output_dir / "adapter_model.safetensors").read_bytes() for r in results)
    assert one == two


def test_a_second_ctrl_c_leaves_at_once(
    tiny_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    values = recipe(tiny_model, rows, tmp_path / "run", max_steps=3, save_steps=1000)
    values["training"] |= {"gradient_accumulation_steps": 1440}  # a step that takes long
    values["training"] |= {"per_device_train_batch_size": 1, "num_train_epochs": 1}
    many = tmp_path / "many.jsonl"
    many.write_text(rows.read_text() * 30)
    values["data"] = {"train": str(many), "eval": 0}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))

    def press_twice() -> None:
        while not (tmp_path / "run" / "monitor.jsonl").exists():
            time.sleep(0.005)
        for _ in range(2):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sys, "argv", ["lorakit", "train", str(path)])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=press_twice).start()
    with pytest.raises(SystemExit) as left:
        main()
    signal.signal(signal.SIGINT, before)
    assert left.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert not list((tmp_path / "run").glob("checkpoint-*"))
