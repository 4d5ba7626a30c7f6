"""A tiny base with adapters of several ranks and targets, and engines over them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from random_adapters import make_adapter

KINDS: dict[str, dict[str, Any]] = {
    "shop": {"r": 4},
    "poet": {"r": 3, "lora_alpha": 20, "use_rslora": True},
    "few": {"r": 8, "target_modules": ["q_proj", "down_proj"]},
    "mixed": {
        "r": 2,
        "rank_pattern": {"v_proj": 5, "gate_proj": 1},
        "alpha_pattern": {"up_proj": 9},
    },
}


@pytest.fixture(scope="session")
def base(attentive_folder: Path) -> Path:
    """The tiny model with its weights scaled up, so that answers depend on every token."""
    return attentive_folder


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(base, folder / name, seed, **config)
        for seed, (name, config) in enumerate(KINDS.items())
    }


@pytest.fixture
def start(base: Path, adapters: dict[str, Path]) -> Iterator[Callable[..., Engine]]:
    """Starts engines that end with the test."""
    engines: list[Engine] = []

    def open_one(**options: Any) -> Engine:
        options = {"dtype": "float32", "max_rows": 4, **options}
        engines.append(open_engine(str(base), options.pop("adapters", adapters), **options))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.close()
