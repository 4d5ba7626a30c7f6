"""Pictures at addresses of the web, fetched where the user has asked for that (`fetch_images`).

An address may stand in data of strangers, so that hosts of the own machine and network are refused
(server-side request forgery) unless they are named. What was fetched for a run is kept with its
hash, so that the run reads the same pictures again.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from ipaddress import IPv6Network, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from lorakit import atomic
from lorakit.errors import InputError, one_line
from lorakit.models.bundled import usable_folder
from lorakit.version import __version__

MOST_FETCHED = 64 * 2**20
"""Bytes of an answer."""

SECONDS = 30.0
"""For a picture, with all redirects; a silent host gets `_SILENT` seconds."""

_SILENT = 10.0
_REDIRECTS = 5
_MOVED = (301, 302, 303, 307, 308)
_TRANSLATED = IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48")  # NAT64 of any IPv4


class HostRefusedError(InputError):
    """A host that is not asked: a private one, or none of those that are named."""


def is_address(value: str) -> bool:
    """Whether `value` is an address of the web."""
    return re.match(r"https?://", value, re.IGNORECASE) is not None


def shown(url: str) -> str:
    """An address without what may be secret in it: a query, a password."""
    parts = urlsplit(url)
    return one_line(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:120])


def kept(
    url: str, hosts: Collection[str] = (), check: Callable[[bytes], object] = lambda data: None
) -> Path:
    """The file of a picture that is fetched at its first use, and read from the cache later.

    It lies in `LORAKIT_HOME/pictures`, with its hash and where it came from in a file beside it.

    Args:
        url: `http://` or `https://`.
        hosts: as in `fetch`.
        check: raises InputError for what is not to be kept.

    Raises:
        InputError: as `fetch` and `check`; or the cache cannot be written.
    """
    name = re.sub(r"[^\w.-]", "_", Path(urlsplit(url).path).name, flags=re.ASCII)[-60:]
    stem = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    file = usable_folder("pictures") / f"{stem}-{name or 'picture'}"
    facts = file.with_name(f"{stem}.json")
    if file.is_file() and facts.is_file():
        data = file.read_bytes()
        if json.loads(facts.read_text()).get("sha256") == hashlib.sha256(data).hexdigest():
            return file
    data = fetch(url, hosts)
    check(data)
    atomic.write_file(file, data)
    found = {
        "url": shown(url),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "fetched_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    atomic.write_file(facts, json.dumps(found, indent=2) + "\n")
    return file


def fetch(url: str, hosts: Collection[str] = (), most_bytes: int | None = None) -> bytes:
    """The bytes at an address. No proxy is used and no cookie or password sent.

    Args:
        url: `http://` or `https://`.
        most_bytes: of the answer; None for `MOST_FETCHED`.
        hosts: if any, the only ones that are asked, as `host` or `host:port`; these may be on the
            own machine or network. Without them every public host is.

    Raises:
        InputError: the host is not allowed, does not answer in time, or says no; or the answer is
            too large or a page.
    """
    deadline = time.monotonic() + SECONDS
    for _ in range(_REDIRECTS + 1):
        connection = _connection(url, hosts)
        try:
            parts = urlsplit(url)
            target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
                "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~") if parts.query else ""
            )
            headers = {"User-Agent": f"lorakit/{__version__}", "Accept": "image/*,*/*;q=0.1"}
            connection.request("GET", target, headers=headers)
            answer = connection.getresponse()
            if answer.status in _MOVED and (place := answer.getheader("Location")):
                url = urljoin(url, place)
                if not is_address(url):
                    raise InputError(f"cannot be fetched: moved to {one_line(url[:80])}")
                continue
            return _body(answer, most_bytes or MOST_FETCHED, deadline)
        except ssl.SSLError as error:
            raise InputError(f"cannot be fetched: {error.reason or 'TLS failed'}") from error
        except TimeoutError as error:
            raise InputError("cannot be fetched: the host does not answer in time") from error
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, InputError):
                raise
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise InputError(f"cannot be fetched: {one_line(str(reason))[:100]}") from error
        finally:
            connection.close()
    raise InputError(f"cannot be fetched: moved more than {_REDIRECTS} times")


def _body(answer: HTTPResponse, most_bytes: int, deadline: float) -> bytes:
    if answer.status != 200:
        reason = f"{answer.status} {one_line(answer.reason)[:60]}".strip()
        raise InputError(f"cannot be fetched: the host answers {reason}")
    kind = answer.getheader("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml", "application/json"):
        raise InputError(f"is not a picture but {kind}; give the address of the picture itself")
    too_large = InputError(f"more than {most_bytes >> 20} MiB; make it smaller")
    if (length := answer.getheader("Content-Length", "")).isdigit() and int(length) > most_bytes:
        raise too_large
    data = bytearray()
    while piece := answer.read1(2**16):
        data += piece
        if len(data) > most_bytes:
            raise too_large
        if time.monotonic() > deadline:
            raise TimeoutError
    if length.isdigit() and len(data) < int(length):
        raise InputError(f"cannot be fetched: it ends after {len(data)} of {length} bytes")
    return bytes(data)


def _connection(url: str, hosts: Collection[str]) -> HTTPConnection:
    """One that checks the addresses of its host when it connects.

    What was looked up is what is connected to, so that a name cannot mean another host by then.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise InputError(f"is no address of the web ({error})") from error
    if not host:
        raise InputError("is no address of the web: it names no host")
    if parts.username or parts.password:
        raise InputError("has a user name in its address, which is not sent; remove it")
    named = _is_named(parts, hosts)
    if hosts and not named:
        allowed = ", ".join(sorted(hosts))
        reason = f"is at {host}, and fetch_images allows {allowed} alone; add the host"
        raise HostRefusedError(reason)
    secure = parts.scheme.lower() == "https"
    kind: Any = _Secure if secure else _Checked
    try:  # without a port, one would be looked for behind the colons of an IPv6 address
        connection: HTTPConnection = kind(host, port or (443 if secure else 80), timeout=_SILENT)
    except HTTPException as error:
        raise InputError(f"is no address of the web ({error})") from error
    connection.may_be_private = named  # type: ignore[attr-defined]
    return connection


def _is_named(parts: SplitResult, hosts: Collection[str]) -> bool:
    host, port = parts.hostname or "", parts.port
    port = port or (443 if parts.scheme.lower() == "https" else 80)
    own = f"[{host}]" if ":" in host else host
    return any(name.lower() in (host, own, f"{own}:{port}") for name in hosts)


class _Checked(HTTPConnection):
    may_be_private = False

    def connect(self) -> None:
        self.sock = _socket(self.host, self.port, self.may_be_private)


class _Secure(HTTPSConnection, _Checked):
    """TLS over what `_Checked` connects: `HTTPSConnection.connect` calls the next class's."""


def _socket(host: str, port: int, may_be_private: bool) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not may_be_private and (own := [a[4][0] for a in found if not _is_public(str(a[4][0]))]):
        raise HostRefusedError(
            f"is at {host} ({own[0]}), an address of the own machine or network, which is not "
            f"asked: name the host in fetch_images ([{host}]) to allow it"
        )
    failure: OSError = OSError("the host has no address")
    for family, kind, protocol, _, address in found:
        one = socket.socket(family, kind, protocol)
        one.settimeout(_SILENT)
        try:
            one.connect(address)
        except OSError as error:
            one.close()
            failure = error
        else:
            return one
    raise failure


def _is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, whatever it stands for in IPv6."""
    ip = ip_address(address.partition("%")[0])
    if ip.version == 6:
        if ip.ipv4_mapped is not None:
            return _is_public(str(ip.ipv4_mapped))
        if ip.sixtofour or ip.teredo or any(ip in network for network in _TRANSLATED):
            return False
    return ip.is_global and not ip.is_multicast
