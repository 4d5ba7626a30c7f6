"""Who may ask: keys, where a server may listen, and what its adapters may be called."""

import socket
from pathlib import Path
from typing import Any, cast

import pytest

from lorakit.engine.adapter_names import named_adapters
from lorakit.errors import InputError
from lorakit.server.options import ApiKey, Limits, ServerOptions, is_loopback, read_keys
from served import Running, address, refused

TEXT = {"model": "shop", "prompt": "a", "max_tokens": 2}
TEXTS = "/v1/completions"
KEYED = {"Authorization": "Bearer api-key"}


@pytest.fixture
def guarded(serve: Any, root: Path) -> Running:
    server: Running = serve(api_keys=(ApiKey("api-key"),), admin_key="admin-key", adapter_root=root)
    return server


def test_all_but_health_and_the_page_need_the_key(guarded: Running) -> None:
    assert guarded.http.get("/health").status_code == 200
    for path in ("/v1/models", "/v1/models/shop", "/metrics", "/openapi.json", "/nope"):
        error = refused(guarded.http.get(path), 401)
        assert error["code"] == "invalid_api_key"
        assert error["type"] == "authentication_error"
        assert guarded.http.get(path, headers=KEYED).status_code == (
            404 if path == "/nope" else 200
        )
    assert refused(guarded.post(TEXTS, TEXT), 401)["message"].startswith("the API key is missing")
    assert guarded.post(TEXTS, TEXT, headers=KEYED).status_code == 200


WRONG_KEYS = [
    "Bearer api-kez",
    "Bearer api-key2",
    "Bearer api-ke",
    "Bearer",
    "Basic api-key",
    "api-key",
    "Bearer \xff",
]


@pytest.mark.parametrize("value", WRONG_KEYS)
def test_a_wrong_key_is_refused(guarded: Running, value: str) -> None:
    headers = {"Authorization": value.encode("latin-1")}
    response = guarded.http.post(TEXTS, json=TEXT, headers=headers)  # type: ignore[arg-type]
    assert "is not right" in refused(response, 401)["message"]
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_a_request_without_the_key_is_refused_before_its_body_comes(guarded: Running) -> None:
    with socket.create_connection(address(guarded), timeout=5) as sock:
        head = f"POST {TEXTS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
        sock.sendall(head.encode())
        assert b" 401 " in sock.recv(100)


def test_adapters_need_the_admin_key_and_not_the_other(guarded: Running) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        refused(guarded.post(path, {}), 401)
        error = refused(guarded.post(path, {}, headers=KEYED), 403)
        assert "admin key, not the API key" in error["message"]
        refused(guarded.post(path, {}, headers={"Authorization": "Bearer admin-key"}), 400)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_an_address_that_others_reach_needs_a_key(host: str) -> None:
    with pytest.raises(InputError, match="give --api-key"):
        ServerOptions(host=host)
    assert ServerOptions(host=host, api_keys=(ApiKey("k"),)).host == host


def test_loopback_addresses_need_none() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.0.1", "::1", "localhost")))


@pytest.mark.parametrize("key", ["", "a b", "käse", "a\n", "\u200b"])
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    for fields in ({"api_keys": (ApiKey(key),)}, {"admin_key": key}):
        with pytest.raises(InputError, match="must be printable ASCII"):
            ServerOptions(**cast(Any, fields))


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must differ"):
        ServerOptions(api_keys=(ApiKey("k"),), admin_key="k")
    with pytest.raises(InputError, match="is not a folder"):
        ServerOptions(adapter_root=tmp_path / "none")
    with pytest.raises(InputError, match="needs --admin-key"):
        ServerOptions(adapter_root=tmp_path)
    with pytest.raises(InputError, match="--drain"):
        ServerOptions(drain=-1)
    for name in ("body_bytes", "requests", "connections", "request_seconds", "header_seconds"):
        fields: Any = {name: 0}
        with pytest.raises(InputError, match=name):
            Limits(**fields)


def test_adapters_are_named_by_their_folder_or_as_told(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    (tmp_path / "runs").mkdir()
    runs = str(tmp_path / "runs")
    assert named_adapters([runs, f"x={runs}"]) == {"runs": Path(runs), "x": Path(runs)}
    assert named_adapters([str(tmp_path / "a=b")]) == {"a=b": tmp_path / "a=b"}
    written = str(tmp_path / "输出"), str(tmp_path / "e\u0301")  # the latter as macOS may write it
    assert named_adapters([*written]) == {"输出": Path(written[0]), "\u00e9": Path(written[1])}
    for wrong in (
        [runs, runs],
        [f"={runs}"],
        [f"a b={runs}"],
        [f"../x={runs}"],
        ["\u202e=x"],
        [""],
    ):
        with pytest.raises(InputError, match="name"):
            named_adapters(wrong)


def test_several_keys_are_let_in_and_come_from_a_file_too(serve: Any, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# who may\nann tml-ann  # a name\n\ntml-bob\n")
    keys = tuple(read_keys(tmp_path / "keys"))
    assert keys == (ApiKey("tml-ann", "ann"), ApiKey("tml-bob"))
    server = serve(api_keys=(*keys, ApiKey("third")), admin_key="admin")
    for key in ("tml-ann", "tml-bob", "third", "admin"):
        for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
            assert server.http.get("/v1/models", headers=headers).status_code == 200
    refused(server.http.get("/v1/models", headers={"X-API-Key": "tml-an"}), 401)


@pytest.mark.parametrize("text", ["", "# none\n", "a b c\n"])
def test_a_file_of_keys_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InputError, match="--api-keys"):
        read_keys(tmp_path / "keys")
    with pytest.raises(InputError, match="cannot read"):
        read_keys(tmp_path / "none")
    with pytest.raises(InputError, match="given twice"):
        ServerOptions(api_keys=(ApiKey("k"), ApiKey("k", "name")))
