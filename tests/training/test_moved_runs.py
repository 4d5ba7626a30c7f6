"""A run, its data and its base model may be moved or copied: nothing refers to old places."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import InputError, LorakitError
from lorakit.training.reproduce import reproduce
from small_runs import recipe


def worsening(model: Path, rows: Path, output: Path, **training: Any) -> dict[str, Any]:
    """A run whose held-out loss is best in its middle; the best weights are left."""
    steady = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "load_best_model_at_end": True}
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 20}
    values = recipe(model, rows, output, max_steps=12, **steady, **every, **training)
    return values | {"samples": 0}


def unfinished_copy(run: Path, copy: Path) -> Path:
    shutil.copytree(run, copy)
    for name in ("adapter_config.json", "adapter_model.safetensors", "lorakit.json"):
        (copy / name).unlink()
    return copy


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_moved_run_leaves_the_best_of_its_own_checkpoints_whatever_lies_at_its_old_place(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    home = tmp_path / "runs" / "a"
    lorakit.train(worsening(tiny_model, rows, home), quiet=True)
    best = weights(home)
    assert best in {weights(c) for c in home.glob("checkpoint-*")}
    assert best != weights(home / "checkpoint-12"), "the test needs a run that gets worse"
    moved, beside = (unfinished_copy(home, tmp_path / name) for name in ("moved", "beside"))
    shutil.rmtree(home)
    lorakit.train(worsening(tiny_model, rows, moved), resume=True, quiet=True)
    assert weights(moved) == best

    lorakit.train(worsening(tiny_model, rows, home, seed=7), quiet=True)
    lorakit.train(worsening(tiny_model, rows, beside), resume=True, quiet=True)
    assert weights(beside) == best
    for file in (*moved.rglob("*.json"), *moved.rglob("*.jsonl")):
        assert str(home) not in file.read_text(encoding="utf-8"), file


def test_the_best_checkpoint_of_a_run_that_is_missing_or_damaged_is_never_replaced_silently(
    tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    home = tmp_path / "run"
    lorakit.train(worsening(tiny_model, rows, home), quiet=True)
    [best] = [c for c in home.glob("checkpoint-*") if weights(c) == weights(home)]
    without = unfinished_copy(home, tmp_path / "without")
    shutil.rmtree(without / best.name)
    lorakit.train(worsening(tiny_model, rows, without), resume=True)
    assert f"{best.name}, the best so far, cannot be used: it is missing" in capsys.readouterr().err
    assert weights(without) == weights(home / "checkpoint-12")

    damaged = unfinished_copy(home, tmp_path / "damaged")
    state = damaged / best.name / "adapter_model.safetensors"
    state.write_bytes(state.read_bytes()[:-8])
    lorakit.train(worsening(tiny_model, rows, damaged), resume=True)
    assert "adapter_model.safetensors has " in capsys.readouterr().err


def test_data_and_a_base_model_that_moved_with_the_same_bytes_are_the_same(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    held_out = tmp_path / "held_out.jsonl"
    shutil.copy(rows, held_out)
    values = recipe(tiny_model, rows, tmp_path / "run", save_steps=2) | {"samples": 0}
    values["data"]["train"] = [str(rows)]
    values["data"]["eval"] = str(held_out)
    lorakit.train(values, quiet=True)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tiny_model, elsewhere / "model")
    for path in (rows, held_out):
        shutil.move(path, elsewhere / path.name)
    moved = json.loads(json.dumps(values).replace(str(tiny_model), str(elsewhere / "model")))
    moved["data"] |= {
        "train": [str(elsewhere / rows.name)],
        "eval": str(elsewhere / held_out.name),
    }
    assert lorakit.train(moved, resume=True, quiet=True).manifest.recipe["model"] == str(tiny_model)
    copy = unfinished_copy(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(copy / "checkpoint-6")
    result = lorakit.train(moved | {"output_dir": str(copy)}, resume=True, quiet=True)
    assert weights(copy) == weights(tmp_path / "run")
    assert result.manifest.continued == []
    again = reproduce(
        tmp_path / "run",
        tmp_path / "again",
        quiet=True,
        model=str(elsewhere / "model"),
        data=[str(elsewhere / rows.name), str(elsewhere / held_out.name)],
    )
    assert again.identical


def test_another_base_model_at_the_same_place_is_noticed(
    tiny_model: Path, rows: Path, tmp_path: Path
):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    values = recipe(model, rows, tmp_path / "run", max_steps=2)
    lorakit.train(values, quiet=True)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "run" / "lorakit.json").unlink()
    with pytest.raises(InputError, match=r"base was '"):
        lorakit.train(values, resume=True, quiet=True)
    with pytest.raises(InputError, match=r"base was .*belongs to its base model"):
        lorakit.train(values, resume=True, accept_changes=True, quiet=True)


@pytest.mark.exhaustive
def test_a_sweep_that_was_stopped_and_moved_goes_on_to_the_table_of_one_that_stayed(
    tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values = recipe(tiny_model, rows, tmp_path / "sweep", max_steps=4)
    values["data"]["eval"] = 0.5
    over = {"lora.r": [2, 4, 8]}
    stayed = lorakit.sweep(values | {"output_dir": str(tmp_path / "stayed")}, over=over, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("lorakit.sweeps.run_sweep.write_leaderboard", _stop)
        with pytest.raises(LorakitError):
            lorakit.sweep(values, over=over, quiet=True)
    shutil.move(tmp_path / "sweep", tmp_path / "moved")
    shutil.move(rows, tmp_path / "moved.jsonl")
    values["data"]["train"] = str(tmp_path / "moved.jsonl")
    values["output_dir"] = str(tmp_path / "moved")
    moved = lorakit.sweep(values, over=over, resume=True, quiet=True)
    assert [row["name"] for row in moved] == [row["name"] for row in stayed]
    assert [row["report"] for row in moved] == [row["report"] for row in stayed]
    shutil.move(tmp_path / "moved", tmp_path / "again")
    values["output_dir"] = str(tmp_path / "again")
    for row in lorakit.sweep(values, over=over, resume=True, quiet=True):
        assert Path(row["folder"]) == tmp_path / "again" / row["name"]


def _stop(*_: object) -> None:
    raise LorakitError("stopped")
