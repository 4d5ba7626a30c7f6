"""A training service over the attentive tiny model, and the Tinker SDK as its client."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lorakit.server.options import ServerOptions
from served import Running, running

tinker = pytest.importorskip("tinker")


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def service(base: Path, state: Path) -> Iterator[Running]:
    with running(base, {}, ServerOptions(port=0, training_state=state), max_rows=4) as server:
        yield server


@pytest.fixture(scope="module")
def connect(service: Running) -> Iterator[Callable[..., Any]]:
    """Makes a client with a key of its own."""
    with ExitStack() as stack:

        def made(key: str = "tml-local") -> Any:
            client = tinker.ServiceClient(base_url=service.url, api_key=key)
            return stack.enter_context(client)

        yield made


@pytest.fixture(scope="module")
def client(connect: Callable[..., Any]) -> Any:
    return connect()
