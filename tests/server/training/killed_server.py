"""A training service in a process that can be killed and started again at the same address."""

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import httpx

from forked import forked


def serve(base: str, state: str, port: int, drain: float) -> None:
    """What the process does."""
    from lorakit.engine.open_engine import open_engine
    from lorakit.server.options import ServerOptions
    from lorakit.server.run import run

    engine = open_engine(base, {}, dtype="float32", max_rows=4)
    options = ServerOptions(port=port, training_state=Path(state), drain=drain)
    run(engine, options, lambda address: None, exits=True)


class KilledServer:
    """The service over `base`, with its checkpoints below `state`."""

    def __init__(self, base: Path, state: Path, drain: float = 30.0) -> None:
        self._arguments = str(base), str(state), _free_port(), drain
        self.url = f"http://127.0.0.1:{self._arguments[2]}"
        self.process: Any = None

    def start(self) -> None:
        self.process = forked(serve, *self._arguments)
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self.process.is_alive(), self.process.exitcode
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the server did not start")

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.signal(signal.SIGKILL)
            self.process.join(30)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
