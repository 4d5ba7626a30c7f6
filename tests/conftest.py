"""What tests of several folders share: a tiny model, that model made to listen, a browser."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from browsers import started_browser
from small_runs import save_sums
from tiny import make_attentive, save_tiny_model

settings.register_profile("every change", max_examples=10, deadline=None)
settings.register_profile("exhaustive", max_examples=100, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis draws few examples, unless the exhaustive tests run too (`make test-all`)."""
    few = "not exhaustive" in config.option.markexpr
    settings.load_profile("every change" if few else "exhaustive")


def pytest_collection_finish() -> None:
    """What has been imported is no garbage: each training run would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What is written is not flushed to the disk: only a power failure could tell."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder; nothing writes into it."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def attentive_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same model as `attentive_model`; nothing writes into it."""
    folder = save_tiny_model(tmp_path_factory.mktemp("attentive"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    make_attentive(model)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def attentive_model(tiny_model: Path) -> Any:
    """The tiny model with its weights scaled up, so that answers depend on every token."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    make_attentive(model)
    return model


@pytest.fixture(scope="module")  # its driver keeps an event loop running in this thread
def browser() -> Iterator[Any]:
    """A real browser; a test that wants one is skipped where there is none."""
    yield from started_browser()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """48 short sums, of different lengths."""
    return save_sums(tmp_path / "rows.jsonl")
