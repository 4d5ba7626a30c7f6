"""What a server is started with: where it listens, the keys that guard it, and its limits."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from lorakit.errors import InputError


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key that requests may bring; `name` is shown in its place in metrics and on pages."""

    value: str = field(repr=False)
    name: str = ""


def read_keys(path: Path) -> list[ApiKey]:
    """The keys in a file: a line each, `KEY` or `NAME KEY`; `#` begins a comment.

    Raises:
        InputError: it cannot be read, or a line has more than that.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--api-keys: cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        parts = line.partition("#")[0].split()
        if len(parts) > 2:
            raise InputError(f"--api-keys: {path}, line {number}: KEY or NAME KEY, nothing more")
        if parts:
            found.append(ApiKey(parts[-1], parts[0] if len(parts) == 2 else ""))
    if not found:
        raise InputError(f"--api-keys: {path} has no key")
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_key(host: str, has_key: bool) -> None:
    """Refuses an address that other machines reach, unless there is a key.

    Raises:
        InputError: there is none.
    """
    if not has_key and not is_loopback(host):
        raise InputError(
            f"--host {host} can be reached from other machines: give --api-key too, or leave "
            "--host out to serve this machine alone"
        )


def check_key(option: str, key: str | None) -> None:
    """Whether a header can carry the key.

    Raises:
        InputError: it cannot.
    """
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise InputError(f"{option} must be printable ASCII without spaces, and not empty")


def check_host_name(option: str, name: str) -> None:
    """Whether `name` is a host's name or address, without a port.

    Raises:
        InputError: it is not.
    """
    if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        return
    try:
        ipaddress.ip_address(name)
    except ValueError as error:
        raise InputError(
            f"{option} takes a name like lora.example.org, or an address, without http:// and "
            f"without a port, not {name!r}"
        ) from error


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
        bodies_bytes: the bodies of all requests under way together (429).
        images: pictures of a request (400); 0 takes none.
        image_bytes: the file of a picture (400).
        image_pixels: all pictures of a request together (400).

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
    bodies_bytes: int = 2 * 1024**3
    images: int = 16
    image_bytes: int = 20 * 1024 * 1024
    image_pixels: int = 40_000_000

    def __post_init__(self) -> None:
        for limit in fields(self):
            none = limit.name in ("waiting", "images")
            value, least = getattr(self, limit.name), 0 if none else 1e-3
            if not least <= value < float("inf"):
                raise InputError(f"the limit {limit.name} must be above 0, not {value}")


@dataclass(frozen=True, slots=True)
class TrainingLimits:
    """How much the training service keeps and computes at most.

    Args:
        models: models of a key that are live at once.
        tokens: of a key's requests to train and to sample that wait or are computed; what a
            request may have at most, too.
        disk_bytes: of a key's checkpoints; 0 is no limit.
        memory_bytes: of all keys' adapters in memory, with gradients and optimizer state; those
            that are used least recently go to disk, and come back when they are used.

    Raises:
        InputError: a limit is out of its range.
    """

    models: int = 64
    tokens: int = 4 << 20
    disk_bytes: int = 0
    memory_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        for limit in fields(self):
            value, least = getattr(self, limit.name), 0 if limit.name == "disk_bytes" else 1
            if value < least:
                raise InputError(f"the training limit {limit.name} must be {least} or more")


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Where and how to serve.

    Args:
        port: 0 takes a free one.
        api_keys: of which a request must bring one; without any, everyone is let in, from this
            machine alone.
        admin_key: for all that an API key is for, for loading and unloading adapters, and to see
            what all keys have; None forbids these.
        adapter_root: the folder that adapters are loaded from; None forbids loading.
        allowed_hosts: names that the server is reached by, beside loopback ones (`gate.py`).
        drain: on SIGTERM, seconds that running answers have to finish.
        training_state: the folder of the training service's checkpoints; None is no service.
        fetch_from: the hosts that pictures of requests are fetched from, which may be private ones;
            empty for every public host, None for none at all.
        training_limits: of that service.

    Raises:
        InputError: the values do not go together.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[ApiKey, ...] = ()
    admin_key: str | None = field(default=None, repr=False)
    adapter_root: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    drain: float = 30.0
    training_state: Path | None = None
    fetch_from: tuple[str, ...] | None = None
    training_limits: TrainingLimits = TrainingLimits()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        values = [key.value for key in self.api_keys]
        for value in values:
            check_key("--api-key", value)
        if len(set(values)) < len(values):
            raise InputError("an API key is given twice")
        check_key("--admin-key", self.admin_key)
        require_key(self.host, bool(values))
        for name in self.allowed_hosts:
            check_host_name("--allowed-host", name)
        if self.admin_key in values:
            raise InputError("--admin-key must differ from --api-key: users would be admins")
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise InputError(f"--adapter-root {self.adapter_root} is not a folder")
        if self.adapter_root is not None and self.admin_key is None:
            raise InputError("--adapter-root needs --admin-key, which loading adapters asks for")
        if not 0 <= self.drain < float("inf"):
            raise InputError(f"--drain must be 0 seconds or more, not {self.drain}")
