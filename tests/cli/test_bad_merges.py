"""A merge that cannot be made is one clear line, leaves nothing, and never touches its source."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bad_input import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit
from command import Command
from forked import forked
from lorakit.adapters import streaming
from lorakit.errors import InputError, LorakitError
from lorakit.models.shards import INDEX_NAME
from tiny import save_tiny_model

FIRST = "model-00001-of-"


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in several files."""
    folder = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def shard(base: Path) -> Path:
    return sorted(base.glob("model-*.safetensors"))[1]


def change_index(base: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = base / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def change_tensor(base: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = shard(base)
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: change(tensors[name])}, path, metadata={"format": "pt"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def in_a_circle(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path)


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (lambda base: shard(base).unlink(), ["is missing"]),
    "truncated shard": (lambda base: cut(shard(base)), ["is damaged or cut off"]),
    "shard that is none": (lambda base: shard(base).write_bytes(b"x" * 99), ["is damaged"]),
    "shard in a circle": (lambda base: in_a_circle(shard(base)), ["in a circle"]),
    "index that leaves one out": (
        lambda base: change_index(base, lambda names: names.popitem()),
        [INDEX_NAME, "does not fit", "the index does not name"],
    ),
    "index that makes one up": (
        lambda base: change_index(base, lambda names: names.update(x=shard(base).name)),
        [INDEX_NAME, "does not fit", "has no x"],
    ),
    "index to another folder": (
        lambda base: change_index(base, lambda names: names.update(x="../../etc/passwd")),
        [INDEX_NAME, "outside the folder"],
    ),
    "index to an absolute path": (
        lambda base: change_index(base, lambda names: names.update(x="/etc/passwd")),
        [INDEX_NAME, "outside the folder"],
    ),
    "index that is no JSON": (
        lambda base: (base / INDEX_NAME).write_text('{"weight_map": '),
        [INDEX_NAME, "is damaged"],
    ),
    "no weights": (
        lambda base: [path.unlink() for path in (shard(base), base / INDEX_NAME)],
        ["holds neither model.safetensors nor"],
    ),
    "NaN in a weight": (
        lambda base: change_tensor(base, lambda t: t.fill_(torch.nan)),
        ["NaN or Inf"],
    ),
    "wrong shape": (
        lambda base: change_tensor(base, lambda t: t[:-1].clone()),
        ["has the shape", "configuration needs"],
    ),
    "tokenizer in a circle": (
        lambda base: in_a_circle(base / "tokenizer.json"),
        ["tokenizer.json", "in a circle"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_base_is_refused_and_nothing_is_written(
    damage: str, base: Path, tiny_adapter: Path, tmp_path: Path
):
    harm, words = DAMAGES[damage]
    harm(base)
    before = contents(base)
    with pytest.raises(LorakitError) as error:
        lorakit.merge(tiny_adapter, tmp_path / "merged", base=str(base), verify=False)
    assert all(word in str(error.value) for word in words), error.value
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert contents(base) == before


def contents(folder: Path) -> dict[str, bytes | str]:
    return {
        path.name: str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.iterdir()
    }


def test_an_adapter_with_nan_or_for_another_base_is_refused(
    base: Path, tiny_adapter: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    broken = tmp_path_factory.mktemp("broken")
    adapter = shutil.copytree(tiny_adapter, broken / "adapter")
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, weights)
    in_a_circle(broken / "circle")
    wide = save_tiny_model(broken / "wide", hidden_size=64)
    for folder, on, words in (
        (adapter, base, "NaN or Inf"),
        (tiny_adapter, wide, "adapter for another base model"),
        (broken / "circle", base, "is not a folder"),
    ):
        with pytest.raises(InputError, match=words):
            lorakit.merge(folder, tmp_path / "merged", base=str(on), verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_command_says_it_in_one_line(
    lorakit_command: Command, base: Path, tiny_adapter: Path, tmp_path: Path
):
    gone = shard(base)
    gone.unlink()
    result = lorakit_command("merge", tiny_adapter, "--base", base, "-o", "merged", "--no-verify")
    refused(result, gone.name, "is missing")


def test_a_name_that_is_too_long_is_said_in_one_line(lorakit_command: Command):
    refused(lorakit_command("merge", "x" * 300, "-o", "merged"), "File name too long")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1, 2]}, "2 numbers for 1 adapters"),
        ({"weights": [float("nan")]}, "nan is not a number between"),
        ({"dtype": "int4"}, "--dtype must be one of"),
    ],
)
def test_a_wrong_option_is_refused(
    tiny_adapter: Path, tmp_path: Path, options: dict[str, Any], words: str
):
    with pytest.raises(InputError, match=words):
        lorakit.merge(tiny_adapter, tmp_path / "merged", **options)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`mounted(options)`: a small file system."""
    folders: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a small file system")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("options", ["size=64k", "ro"])
def test_a_disk_that_is_full_or_read_only_is_said_and_nothing_is_left(
    options: str, tiny_adapter: Path, mounted: Callable[[str], Path]
):
    disk = mounted(options)
    with pytest.raises(LorakitError, match="cannot write") as error:
        lorakit.merge(tiny_adapter, disk / "merged", verify=False)
    assert error.value.exit_code == 1
    assert str(disk / "merged") in str(error.value)
    assert list(disk.iterdir()) == []


def merge_and_wait(adapter: Path, out: Path, base: Path) -> None:
    """Merges, and waits for long when all weights are written."""
    streaming.copy_others = lambda *_: time.sleep(60)
    lorakit.merge(adapter, out, base=str(base), verify=False)


def test_a_merge_that_was_killed_leaves_nothing_in_the_way_of_the_next(
    base: Path, tiny_adapter: Path, tmp_path: Path
):
    before = contents(base)
    out = tmp_path / "merged"
    process = forked(merge_and_wait, tiny_adapter, out, base)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(f".merged.*/{INDEX_NAME}")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not out.exists()
    assert list(tmp_path.glob(".merged.*"))
    assert lorakit.merge(tiny_adapter, out, base=str(base)).passed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]
    assert contents(base) == before
