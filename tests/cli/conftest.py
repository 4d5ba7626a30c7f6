from functools import partial
from pathlib import Path

import pytest

import lorakit
from command import Command, run_lorakit, run_process


@pytest.fixture(scope="session")
def tiny_adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on `tiny_model` whose update is not zero."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = lorakit.load_model(tiny_model)
    config = lorakit.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    lorakit.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(f'{{"prompt": "{n} + {n}?", "completion": "{2 * n}"}}\n' for n in range(20))
    )
    return path


@pytest.fixture
def lorakit_command(tmp_path: Path) -> Command:
    """Runs the command in `tmp_path` and in this process; its output is text."""
    return partial(run_lorakit, tmp_path)


@pytest.fixture
def lorakit_process(tmp_path: Path) -> Command:
    """Runs the command in `tmp_path` as a process of its own: seconds each."""
    return partial(run_process, tmp_path)
