"""A checkpoint is whole or is not used, whatever file of it is cut off, missing or changed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.errors import InputError
from lorakit.training.checkpoints import SEAL_NAME, damage, newest_whole
from matrix import few
from small_runs import recipe

RESULTS = ("adapter_config.json", "adapter_model.safetensors", "lorakit.json")
FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "chat_template.jinja",
    "lorakit_counts.json",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    SEAL_NAME,
}


def as_killed_before_its_end(run: Path, copy: Path) -> Path:
    """A copy of a run without what is written behind the last checkpoint."""
    shutil.copytree(run, copy)
    for name in RESULTS:
        (copy / name).unlink()
    return copy


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A recipe with a constant schedule and dropout, and its run: checkpoints at 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("whole")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{n}?", "completion": "{n}"}}\n' for n in range(24)))
    values = recipe(tiny_model, rows, folder / "run", max_steps=5, save_steps=2, save_total_limit=9)
    values["training"]["lr_scheduler_type"] = "constant"
    values["lora"]["lora_dropout"] = 0.1
    values["samples"] = 0
    lorakit.train(values, quiet=True)
    return values, folder / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_every_file_of_a_checkpoint_that_is_missing_cut_or_changed_is_noticed(
    finished: tuple[Any, Path], tmp_path: Path
):
    _, run = finished
    assert {path.name for path in (run / "checkpoint-5").iterdir()} == FILES
    assert newest_whole(run).checkpoint == run / "checkpoint-5"
    for name in FILES:
        for harm in (Path.unlink, cut, flip):
            copy = tmp_path / "checkpoint-5"
            shutil.copytree(run / "checkpoint-5", copy)
            harm(copy / name)
            reason = damage(copy)
            assert reason is not None, (name, harm)
            if name != SEAL_NAME:
                assert name in reason
            shutil.rmtree(copy)


@pytest.mark.parametrize("harm", few([Path.unlink, cut, flip], flip))
def test_the_newest_whole_checkpoint_is_resumed_from_to_the_same_bytes_and_that_is_said(
    finished: tuple[Any, Path],
    tmp_path: Path,
    harm: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
):
    values, run = finished
    copy = as_killed_before_its_end(run, tmp_path / "run")
    harm(copy / "checkpoint-5" / "optimizer.pt")
    harm(copy / "checkpoint-4" / "trainer_state.json")
    lorakit.train({**values, "output_dir": str(copy)}, resume=True)
    shown = capsys.readouterr().err
    assert "checkpoint-5 is not whole and is not used: optimizer.pt" in shown
    assert "checkpoint-4 is not whole and is not used: trainer_state.json" in shown
    assert "resuming from checkpoint-2" in shown
    assert weights(copy) == weights(run)
    assert newest_whole(copy).damaged == []
    steps = [line.split(",")[0] for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert steps == [
        line.split(",")[0] for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_run_that_was_killed_behind_its_last_checkpoint_trains_no_further_step(
    finished: tuple[Any, Path], tmp_path: Path
):
    values, run = finished
    copy = as_killed_before_its_end(run, tmp_path / "run")
    resumed = lorakit.train({**values, "output_dir": str(copy)}, resume=True, quiet=True)
    assert resumed.manifest.steps == 5
    assert weights(copy) == weights(run)


def test_without_a_whole_checkpoint_nothing_is_started_over_silently(
    finished: tuple[Any, Path], tmp_path: Path
):
    values, run = finished
    copy = as_killed_before_its_end(run, tmp_path / "run")
    for checkpoint in copy.glob("checkpoint-*"):
        cut(checkpoint / "rng_state.pth")
    before = sorted(p.relative_to(copy) for p in copy.rglob("*"))
    with pytest.raises(InputError, match=r"none of the checkpoints .*rng_state.pth.* start again"):
        lorakit.train({**values, "output_dir": str(copy)}, resume=True, quiet=True)
    assert sorted(p.relative_to(copy) for p in copy.rglob("*")) == before
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    lorakit.train({**values, "output_dir": str(copy)}, resume=True, quiet=True)
    assert weights(copy) == weights(run)


def test_damaged_newer_checkpoints_do_not_push_out_the_ones_that_are_written_now(
    finished: tuple[Any, Path], tmp_path: Path
):
    values, run = finished
    copy = as_killed_before_its_end(run, tmp_path / "run")
    cut(copy / "checkpoint-5" / "optimizer.pt")
    cut(copy / "checkpoint-4" / "optimizer.pt")
    limited = {**values["training"], "save_total_limit": 1, "save_steps": 1}
    changed = {**values, "training": limited, "output_dir": str(copy)}
    lorakit.train(changed, resume=True, accept_changes=True, quiet=True)
    assert [path.name for path in copy.glob("checkpoint-*")] == ["checkpoint-5"]
    assert weights(copy) == weights(run)


def test_a_checkpoint_of_the_model_alone_is_resumed_by_continue_only_which_says_so(
    finished: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    values, _ = finished
    values = {**values, "output_dir": str(tmp_path / "run")}
    values["training"] = {**values["training"], "save_only_model": True, "max_steps": 4}
    lorakit.train(values, quiet=True)
    longer = {**values, "training": {**values["training"], "max_steps": 6}}
    for name in RESULTS:
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    with pytest.raises(InputError, match=r"save_only_model.*--continue"):
        lorakit.train(values, resume=True, quiet=True)
    result = lorakit.train(longer, resume=True, accept_changes=True)
    assert "moments start from zero" in capsys.readouterr().err
    assert any("save_only_model" in line for line in result.manifest.continued[0]["changes"])
    assert result.manifest.steps == 6
