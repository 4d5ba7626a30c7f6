"""Who reaches a server: the address that it listens on, and the keys that guard it."""

from __future__ import annotations

import ipaddress
import re

from lorakit.errors import InputError


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_key(host: str, api_key: str | None) -> None:
    """Refuses an address that other machines reach, unless there is a key.

    Raises:
        InputError: there is none.
    """
    if api_key is None and not is_loopback(host):
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
