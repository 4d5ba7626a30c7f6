"""Listening: the socket, uvicorn on it, and an end that lets running answers finish.

The end comes in its time: where a thread is stuck that cannot be interrupted, the process ends
without it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from lorakit.console import say
from lorakit.engine.engine import Engine
from lorakit.errors import InputError
from lorakit.server.app import create_app
from lorakit.server.connections import connection_class
from lorakit.server.open_answers import Desk
from lorakit.server.options import Limits, ServerOptions

if TYPE_CHECKING:
    from lorakit.server.training.routes import TrainingRoutes

_LAST_WORDS = 2.0  # seconds in which answers that were cut off are told so
_SECONDS_TO_END = 5.0  # for what is to be ended after the last answer
_LONGEST_HEAD = 64 * 1024
_SWITCH_SECONDS = 5e-4
"""For how long a thread of Python keeps another one waiting. The one that computes gives the lock
away in each of a step's few hundred operations, and would get it back only after 5 ms each while
replies are written or an adapter is read."""
_IDLE_SECONDS = 30  # longer than clients keep connections (httpx 5), so that these close them first


def run(
    engine: Engine, options: ServerOptions, started: Callable[[str], None], *, exits: bool = False
) -> None:
    """Serves until SIGTERM or SIGINT, and then until running answers have ended or `drain` is over.

    Meanwhile new requests get 503; a second signal ends at once. The engine is closed at the end.

    Args:
        started: is called with the server's address when it takes requests.
        exits: whether the process is to end after this. It then does so at most some seconds after
            the time to drain, with status 1 if something is stuck.

    Raises:
        InputError: the address cannot be listened on.
    """
    try:
        with listen(options.host, options.port) as sock:
            engine.grammars.prepare()
            _leave_alone_what_stays()
            sys.setswitchinterval(_SWITCH_SECONDS)
            server = make_server(engine, options, started)
            if exits:
                server.on_signal = _exit_after
            server.run(sockets=[sock])
    finally:
        if not engine.close(wait=_SECONDS_TO_END) and exits:
            _exit_stuck()


def _leave_alone_what_stays() -> None:
    """Has the garbage collector pass over what is in memory now.

    A full collection goes through a million objects of the libraries and the model, for half a
    second in which no thread runs; reading an adapter makes enough objects to bring one about.
    """
    gc.collect()
    gc.freeze()


def _exit_after(seconds: float) -> None:
    """Ends the process after so many seconds, unless it has ended by then."""

    def wait() -> None:
        time.sleep(seconds)
        _exit_stuck()

    threading.Thread(target=wait, name="lorakit-last-resort", daemon=True).start()


def _exit_stuck() -> None:
    say("error: something was stuck and did not end with the server", err=True)
    os._exit(1)


def show_log(name: str) -> None:
    """Shows the log of this name on stderr, a line a record with its time."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(self.format(record), err=True)

    handler = Shown()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger(name).addHandler(handler)
    logging.getLogger(name).setLevel(logging.INFO)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound to the address.

    Raises:
        InputError: it cannot be.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host}, port {port}: {error}") from error


def make_server(
    engine: Engine, options: ServerOptions, started: Callable[[str], None] = lambda _: None
) -> DrainingServer:
    """uvicorn's server with the application over `engine`."""
    app, desk = create_app(engine, options)
    config = uvicorn.Config(
        app,
        http=connection_class(options.limits),
        ws="none",
        lifespan="off",
        timeout_keep_alive=_IDLE_SECONDS,
        h11_max_incomplete_event_size=_LONGEST_HEAD,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(_LAST_WORDS),
    )
    _allow_connections(options.limits)
    return DrainingServer(config, desk, options.drain, started, app.state.training)


class DrainingServer(uvicorn.Server):
    """A server that keeps its door open while it drains, to say that it ends."""

    def __init__(
        self,
        config: uvicorn.Config,
        desk: Desk,
        drain: float,
        started: Callable[[str], None],
        training: TrainingRoutes | None = None,
    ) -> None:
        super().__init__(config)
        self._desk, self._drain, self._told = desk, drain, started
        self._training = training
        self._ending: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.on_signal: Callable[[float], None] = lambda _: None
        """Is called at a signal with the seconds after which everything should have ended."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._told(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second ends at once."""
        if self._desk.draining or self._loop is None:
            self.should_exit = self.force_exit = True
            self.on_signal(_SECONDS_TO_END)
        else:
            self.on_signal(self._drain + 2 * _LAST_WORDS + 2 * _SECONDS_TO_END)
            self.drain()

    def drain(self) -> None:
        """Takes no new requests, and ends when the running ones have."""
        self._desk.draining = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start_ending)

    def _start_ending(self) -> None:
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        if self._training is not None:
            self._training.drain()
        if not await self._quiet(self._drain):
            self._desk.stop()
            if self._training is not None:
                self._training.stop()
            await self._quiet(_LAST_WORDS)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._training is not None:
            self._training.close()

    async def _quiet(self, seconds: float) -> bool:
        """Whether all requests end within so many seconds."""
        until = time.monotonic() + seconds
        while self._desk.inside:
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(0.05)
        return True


def _allow_connections(limits: Limits) -> None:
    """Asks for as many open files as the connections need, and some for the rest."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        with suppress(ValueError, OSError):  # then as many as there may be
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
