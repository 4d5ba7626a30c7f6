"""Pushing sends what was shown and nothing else; pulling takes known files, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command import run_lorakit
from hub_in_memory import Hub, use_hub
from lorakit.adapters.hub import pull, push, selection
from lorakit.errors import InputError
from matrix import few
from plain_adapters import save_adapter, updates

MANIFEST = {
    "base_model": "BASE",
    "recipe": {"data": {"train": "/home/ada/secret/rows.jsonl"}},
    "data": [{"path": "/home/ada/secret/rows.jsonl"}],
    "steps": 1,
    "train_seconds": 1.0,
    "train_tokens": 1,
    "supervised_tokens": 1,
    "tokens_per_second": 1.0,
    "peak_memory_mb": 1.0,
    "eval_loss": None,
    "base_eval_loss": None,
    "versions": {},
    "seed": 0,
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter's folder as training leaves one."""
    folder = save_adapter(tiny_model, tmp_path / "adapter", r=2)
    (folder / "lorakit.json").write_text(json.dumps(MANIFEST))
    (folder / "samples.json").write_text("[]")
    (folder / "metrics.jsonl").write_text("")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"x")
    return folder


def process(
    tmp_path: Path, endpoint: str, *arguments: str | Path
) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own with the hub at `endpoint`."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_test"}
    return subprocess.run(
        [sys.executable, "-m", "lorakit", *map(str, arguments)],
        cwd=tmp_path,
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """As `process`, in this one."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")

    def run(endpoint: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        use_hub(monkeypatch, tmp_path / "cache", endpoint)
        return run_lorakit(tmp_path, *arguments)

    return run


@pytest.mark.parametrize("apart", few([False, True], False))
def test_what_is_uploaded_comes_back_and_nothing_else_went(
    apart: bool, hub: Hub, adapter: Path, tiny_model: Path, command: Any, tmp_path: Path
):
    run = partial(process, tmp_path) if apart else command
    where = f"http://127.0.0.1:{hub.server_port}"
    pushed = run(where, "push", adapter, "ada/orders", "--private", "--yes")
    assert pushed.returncode == 0, pushed.stderr
    assert "stays here: checkpoint-5/, lorakit.json, metrics.jsonl, samples.json" in pushed.stdout
    assert "/home/ada/secret/rows.jsonl" in pushed.stdout  # it is said what the record has
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert hub.files.keys() == names
    assert hub.private is True
    assert not any(b"secret" in content for content in hub.files.values())

    pulled = run(where, "pull", "ada/orders", "-o", "back")
    assert pulled.returncode == 0, pulled.stderr
    assert {path.name for path in (tmp_path / "back").iterdir()} == names
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (adapter / name).read_bytes()
    assert updates(tmp_path / "back", tiny_model).keys() == updates(adapter, tiny_model).keys()


def test_the_record_goes_up_when_asked_for_and_to_a_branch(hub: Hub, adapter: Path, command: Any):
    where = f"http://127.0.0.1:{hub.server_port}"
    arguments = ("--with-record", "--revision", "v2", "-y")
    pushed = command(where, "push", adapter, "ada/orders", *arguments)
    assert pushed.returncode == 0, pushed.stderr
    assert "lorakit.json is uploaded, and names the recipe and the data" in pushed.stdout
    assert "lorakit.json" in hub.files
    assert hub.branches == ["v2"]


def test_without_an_answer_nothing_is_sent(hub: Hub, adapter: Path, command: Any):
    where = f"http://127.0.0.1:{hub.server_port}"
    asked = command(where, "push", adapter, "ada/orders")
    assert asked.returncode == 2
    assert "adapter_model.safetensors (" in asked.stdout
    assert (
        asked.stderr
        == "error: cannot ask for confirmation without a terminal: --yes uploads without asking\n"
    )
    assert not hub.files
    assert push(adapter, "ada/orders", confirm=lambda chosen: False) is None


def test_a_hub_that_is_not_there_is_one_line(adapter: Path, command: Any, tmp_path: Path):
    nowhere = "http://127.0.0.1:9"
    pushed = command(nowhere, "push", adapter, "ada/orders", "--yes")
    pulled = command(nowhere, "pull", "ada/orders", "-o", "back")
    for result, what in ((pushed, "was not uploaded"), (pulled, "was not fetched")):
        assert result.returncode == 1
        assert result.stderr.startswith(f"error: ada/orders {what}: ")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "back").exists()


def test_what_is_no_adapter_is_not_pulled(hub: Hub, adapter: Path, command: Any, tmp_path: Path):
    where = f"http://127.0.0.1:{hub.server_port}"
    hub.files = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.bin": b"pickle"}
    result = command(where, "pull", "ada/orders", "-o", "back")
    assert result.returncode == 2
    assert "ada/orders/adapter_model.bin is damaged" in result.stderr
    hub.files = {"adapter_config.json": b'{"peft_type": "LORA"}'}
    result = command(where, "pull", "ada/orders", "-o", "back")
    assert result.returncode == 2
    assert "ada/orders holds no adapter_model.safetensors" in result.stderr
    hub.files = {"config.json": b"{}"}
    result = command(where, "pull", "ada/orders", "-o", "back2")
    assert "holds no adapter: there is no adapter_config.json" in result.stderr
    assert not (tmp_path / "back").exists()


def test_a_pickle_of_tensors_is_pulled_as_safetensors_and_never_pushed(
    hub: Hub, adapter: Path, command: Any, tmp_path: Path
):
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    shutil.copyfile(adapter / "adapter_config.json", tmp_path / "adapter_config.json")
    hub.files = {
        name: (tmp_path / name).read_bytes()
        for name in ("adapter_model.bin", "adapter_config.json")
    }
    where = f"http://127.0.0.1:{hub.server_port}"
    result = command(where, "pull", "ada/orders", "-o", "back")
    assert result.returncode == 0, result.stderr
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in back)
    assert not list((tmp_path / "back").glob("*.bin"))
    with pytest.raises(InputError, match="as a pickle"):
        push(tmp_path, "ada/orders")


def test_names_and_folders_that_cannot_be_are_refused(adapter: Path, tmp_path: Path):
    for repo in ("orders", "a/b/c", "ada/or ders"):
        with pytest.raises(InputError, match="is not a repository's name"):
            push(adapter, repo)
        with pytest.raises(InputError, match="is not a repository's name"):
            pull(repo, tmp_path / "x")
    with pytest.raises(InputError, match="already exists"):
        pull("ada/orders", adapter)
    with pytest.raises(InputError, match="holds no adapter"):
        push(tmp_path, "ada/orders")


def test_a_base_named_by_a_path_of_this_machine_is_said(adapter: Path, tiny_model: Path):
    chosen = selection(adapter)
    assert any(f"by a path of this machine, {tiny_model}" in line for line in chosen.notices)
