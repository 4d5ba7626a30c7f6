"""Pictures of the web: fetched once where that is asked for, and never from private hosts."""

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from PIL import Image

from lorakit.data import fetched_pictures
from lorakit.data.dataset import load_samples
from lorakit.data.fetched_pictures import _is_public, fetch, kept
from lorakit.data.pictures import open_picture, pictures_in
from lorakit.errors import InputError


def red() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (9, 7), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Site(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.partition("?")[0]
        port = self.server.server_address[1]
        moved = {
            "/moved.png": "/red.png",
            "/circle.png": "/circle.png",
            "/elsewhere.png": f"http://localhost:{port}/red.png",
            "/file.png": "file:///etc/passwd",
        }
        self.send_response(404 if name == "/gone.png" else 302 if name in moved else 200)
        if name in moved:
            self.send_header("Location", moved[name])
            self.end_headers()
            return
        pages = {"/page.png": b"<html>", "/large.png": bytes(5000), "/no.png": b"no"}
        data = pages.get(name, red())
        kind = "text/html; charset=utf-8" if name == "/page.png" else "image/png"
        self.send_header("Content-Type", kind)
        if name != "/endless.png":
            self.send_header("Content-Length", str(len(data) + 10 * (name == "/cut.png")))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    Site.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def rows(folder: Path, url: str) -> Path:
    file = folder / "rows.jsonl"
    file.write_text(json.dumps({"question": "which?", "answer": "red", "image": url}) + "\n")
    return file


def test_a_picture_of_the_web_is_fetched_once_and_kept_with_its_hash(
    site: str, tmp_path: Path
) -> None:
    file = rows(tmp_path, f"{site}/moved.png?key=secret")
    for _ in range(2):
        with pictures_in(fetch=["127.0.0.1"]):
            [sample] = load_samples(file)
        assert open_picture(sample.pictures[0])[0].size == (9, 7)
    assert Site.asked == ["/moved.png?key=secret", "/red.png"]
    [facts] = (tmp_path / "home" / "pictures").glob("*.json")
    assert "secret" not in facts.read_text()
    [picture] = (tmp_path / "home" / "pictures").glob("*.png")
    picture.write_bytes(b"changed")  # the hash tells
    assert kept(f"{site}/moved.png?key=secret", ["127.0.0.1"]).read_bytes() == red()


def test_no_picture_is_fetched_unless_asked_and_no_private_host_is_unless_named(
    site: str, tmp_path: Path
) -> None:
    file = rows(tmp_path, f"{site}/red.png?key=secret")
    with pytest.raises(InputError, match=r"data\.fetch_images") as unasked:
        load_samples(file)
    assert "secret" not in str(unasked.value)
    with pytest.raises(InputError, match=r"rows.jsonl:1.*127\.0\.0\.1"), pictures_in(fetch=True):
        load_samples(file)
    with pytest.raises(InputError, match=r"example\.com"):
        fetch(f"{site}/red.png", ["example.com"])
    with pytest.raises(InputError, match="localhost"):  # where a host that is named has moved it
        fetch(f"{site}/elsewhere.png", ["127.0.0.1"])
    assert Site.asked == ["/elsewhere.png"]
    port = site.rpartition(":")[2]
    assert fetch(f"{site}/elsewhere.png", ["127.0.0.1", f"LOCALHOST:{port}"]) == red()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.png", "404"),
        ("page.png", "text/html"),
        ("circle.png", "moved more than"),
        ("file.png", "moved to file:"),
        ("cut.png", "ends after"),
        ("large.png", "more than"),
        ("endless.png?large", ""),
        ("no.png", "not a picture"),
    ],
)
def test_what_is_no_picture_is_refused_and_not_kept(
    name: str, reason: str, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetched_pictures, "MOST_FETCHED", 4000)
    if not reason:  # no length is told, and none is needed
        assert fetch(f"{site}/{name}", ["127.0.0.1"]) == red()
        return
    with pytest.raises(InputError, match=reason), pictures_in(fetch=["127.0.0.1"]):
        load_samples(rows(tmp_path, f"{site}/{name}"))
    assert not [*(tmp_path / "home").rglob("*.png")]


def test_a_host_that_is_silent_or_away_is_refused_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetched_pictures, "_SILENT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(InputError, match="in time"):
            fetch(f"http://127.0.0.1:{port}/a.png", ["127.0.0.1"])
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch(f"http://127.0.0.1:{port}/a.png", ["127.0.0.1"])


@pytest.mark.parametrize("url", ["http:///a.png", "http://[::1/a.png", "http://me:pass@host/a.png"])
def test_addresses_that_name_no_host_are_refused(url: str) -> None:
    with pytest.raises(InputError) as raised:
        fetch(url)
    assert "pass" not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
        *("0.0.0.0", "224.0.0.1", "::", "::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1"),
    ],
)
def test_addresses_of_the_own_machine_and_network_are_not_public(address: str) -> None:
    assert not _is_public(address)


def test_addresses_of_the_internet_are_public() -> None:
    assert _is_public("93.184.215.14")
    assert _is_public("2606:4700:4700::1111")
    assert _is_public("::ffff:93.184.215.14")
