"""What a server is started with: where it listens, the keys, and the limits that it keeps."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from lorakit.errors import InputError
from lorakit.server.access import check_host_name, check_key, require_key


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is asked of a server at most; what goes beyond is refused, and told why.

    Args:
        body_bytes: a request's body (413).
        requests: requests that are answered or wait at once, in all (429).
        waiting: answers that wait for a row (429); `n` and lists of prompts count each.
        connections: open connections (503).
        request_seconds: from a request to the end of its answer, which is cut there; one that
            still waits gets 503.
        header_seconds: until a connection has sent the head of a request (it is closed), and
            until the body has come (408).
        write_seconds: how long a client may take nothing of its answer (it is left).

    Raises:
        InputError: a limit is not above zero.
    """

    body_bytes: int = 4 * 1024 * 1024
    requests: int = 512
    waiting: int = 256
    connections: int = 2048
    request_seconds: float = 600.0
    header_seconds: float = 20.0
    write_seconds: float = 60.0

    def __post_init__(self) -> None:
        for limit in fields(self):
            value, least = getattr(self, limit.name), 0 if limit.name == "waiting" else 1e-3
            if not least <= value < float("inf"):
                raise InputError(f"the limit {limit.name} must be above 0, not {value}")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and how to serve.

    Args:
        port: 0 takes a free one.
        api_key: what a request must bring; None lets everyone in, from this machine alone.
        admin_key: what loading and unloading adapters needs in its place; None forbids both.
        adapter_root: the folder that adapters are loaded from; None forbids loading.
        allowed_hosts: names that the server is reached by, beside loopback ones (`hosts.py`).
        drain: on SIGTERM, seconds that running answers have to finish.

    Raises:
        InputError: the values do not go together.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    adapter_root: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    drain: float = 30.0
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        check_key("--api-key", self.api_key)
        check_key("--admin-key", self.admin_key)
        require_key(self.host, self.api_key)
        for name in self.allowed_hosts:
            check_host_name("--allowed-host", name)
        if self.admin_key is not None and self.admin_key == self.api_key:
            raise InputError("--admin-key must differ from --api-key: users would be admins")
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise InputError(f"--adapter-root {self.adapter_root} is not a folder")
        if self.adapter_root is not None and self.admin_key is None:
            raise InputError("--adapter-root needs --admin-key, which loading adapters asks for")
        if not 0 <= self.drain < float("inf"):
            raise InputError(f"--drain must be 0 seconds or more, not {self.drain}")
