"""A real server in a thread, over a tiny base whose greedy answers never end by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit.server.options import Limits, ServerOptions
from random_adapters import make_adapter
from served import Running, running
from tiny import make_attentive

Serve = Callable[..., Running]


@pytest.fixture(scope="session")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights scaled up and a long context; its greedy answers never end."""
    folder = tmp_path_factory.mktemp("served") / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.config.max_position_embeddings = 4096
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    make_attentive(model)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # another token is always likelier
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def root(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters: shop and poet; nothing writes into it."""
    folder = tmp_path_factory.mktemp("root") / "adapters"
    for seed, name in enumerate(("shop", "poet")):
        make_adapter(base, folder / name, seed)
    return folder


@pytest.fixture(scope="session")
def served(base: Path, root: Path) -> Iterator[Running]:
    """A server without keys that all tests share which leave it as it is."""
    adapters = {name: root / name for name in ("shop", "poet")}
    with running(base, adapters, ServerOptions(port=0), max_rows=8) as server:
        yield server


@pytest.fixture
def serve(base: Path, root: Path) -> Iterator[Serve]:
    """Starts a server of one's own, with `shop`; takes the fields of options and limits."""
    with ExitStack() as stack:

        def start(
            limits: dict[str, Any] | None = None, max_rows: int = 4, **options: Any
        ) -> Running:
            chosen = ServerOptions(port=0, limits=Limits(**(limits or {})), **options)
            return stack.enter_context(running(base, {"shop": root / "shop"}, chosen, max_rows))

        yield start
