"""The names that a server answers to, and web pages of others: by header, and in a real browser."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from browsers import started_browser
from lorakit.errors import InputError
from lorakit.server.gate import Hosts
from lorakit.server.options import ApiKey, ServerOptions
from served import Running, address, all_of, running

TEXT = {"model": "shop", "prompt": "a", "max_tokens": 1}
OWN = ["localhost", "LOCALHOST", "localhost:9", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:5"]
OWN += ["localhost.", "127.0.0.2:1", "[0:0:0:0:0:0:0:1]"]
OTHERS = ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example"]
OTHERS += ["evil.example:localhost", "localhost@evil.example", "evil.example@localhost", "", " "]
OTHERS += ["localhost:80@evil.example", "evillocalhost", "0.0.0.0", "[::]", "192.168.0.1", "local"]
OTHERS += ["localhost/evil.example", "evil.example#localhost", "evil.example?localhost", "[::1"]
OTHERS += ["localhost,evil.example", "localhost evil.example", "localhost:x", "\xff", "2130706433"]


def status(server: Running, host: str | None, *lines: str, method: str = "GET") -> int:
    """The status of a request for the models, or of one that is answered, by raw lines."""
    body = json.dumps(TEXT).encode() if method == "POST" else b""
    path = "/v1/completions" if method == "POST" else "/v1/models"
    head = [f"{method} {path} HTTP/1.1" if host is not None else f"{method} {path} HTTP/1.0"]
    head += [] if host is None else [f"Host: {host}"]
    head += ["Connection: close", "Content-Type: application/json", *lines]
    head += [f"Content-Length: {len(body)}", "", ""]
    with socket.create_connection(address(server), timeout=10) as sock:
        sock.sendall("\r\n".join(head).encode("latin-1") + body)
        return int(all_of(sock).split(None, 2)[1])


def test_a_server_on_loopback_answers_to_loopback_names_alone(served: Running) -> None:
    assert {host: status(served, host) for host in OWN} == dict.fromkeys(OWN, 200)
    assert {host: status(served, host) for host in OTHERS} == dict.fromkeys(OTHERS, 403)
    assert status(served, None) == 200  # HTTP/1.0, which no browser speaks
    for path in ("/health", "/", "/metrics", "/nowhere"):
        response = served.http.get(path, headers={"Host": "evil.example"})
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "host_not_allowed"
        assert "--allowed-host" in response.json()["error"]["message"]


def test_names_may_be_added(serve: Any) -> None:
    server = serve(allowed_hosts=("lora.example.org", "10.1.2.3", "fd00::1"))
    for host in ("lora.example.org", "LORA.example.org:8080", "10.1.2.3:80", "[fd00::1]:1", *OWN):
        assert status(server, host) == 200, host
    for host in ("example.org", "x.lora.example.org", "10.1.2.4"):
        assert status(server, host) == 403, host


@pytest.mark.parametrize("host", ["192.168.1.5", "0.0.0.0", "::"])
def test_other_addresses_answer_to_any_name_unless_names_are_given(host: str) -> None:
    head = [(b"host", b"evil.example")]
    Hosts(host, (), has_key=True).check("POST", head)
    named = Hosts(host, ("lora.example.org",), has_key=True)
    named.check("POST", [(b"host", b"lora.example.org")])
    named.check("POST", [(b"host", b"localhost")])
    with pytest.raises(Exception, match="evil"):
        named.check("POST", head)


PAGES = [  # headers as browsers send them, and whether a server without a key lets them pass
    (["Origin: http://localhost:8000"], True),
    (["Origin: http://localhost:8000", "Sec-Fetch-Site: same-origin"], True),
    (["Origin: https://lora.example.org", "Sec-Fetch-Site: same-origin"], True),  # a proxy's
    (["Sec-Fetch-Site: none"], True),
    (["Origin: https://evil.example"], False),
    (["Origin: https://evil.example", "Sec-Fetch-Site: cross-site"], False),
    (["Sec-Fetch-Site: cross-site"], False),
    (["Origin: http://localhost:3000", "Sec-Fetch-Site: same-site"], False),
    (["Origin: http://localhost:3000"], False),
    (["Origin: null"], False),
    (["Origin: null", "Sec-Fetch-Site: cross-site"], False),
    (["Origin: ", "Sec-Fetch-Site: x"], False),
    (["Origin: file://"], False),
    (["Origin: http://[localhost:8000"], False),
]


@pytest.mark.parametrize(("lines", "passes"), PAGES)
def test_a_page_of_another_origin_cannot_use_a_server_without_a_key(
    served: Running, lines: list[str], passes: bool
) -> None:
    assert status(served, "localhost:8000", *lines, method="POST") == (200 if passes else 403)


def test_a_key_or_the_pages_name_lets_a_page_of_another_origin_pass(serve: Any) -> None:
    lines = ["Origin: https://ui.example.org", "Sec-Fetch-Site: cross-site"]
    keyed = serve(api_keys=(ApiKey("k"),))
    assert status(keyed, "localhost", *lines, "Authorization: Bearer k", method="POST") == 200
    assert status(keyed, "localhost", *lines, method="POST") == 401
    assert status(serve(allowed_hosts=("ui.example.org",)), "localhost", *lines, method="POST") == (
        200
    )


@pytest.mark.parametrize("name", ["", "http://x", "x:80", "*", "a b", "x/", "[::1]", "ä", "x\n"])
def test_what_is_no_name_of_a_host_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="--allowed-host"):
        ServerOptions(allowed_hosts=(name,))


# --- in a browser -------------------------------------------------------------------------------

EVIL = """<!doctype html><title>evil</title>
<iframe name="f"></iframe>
<form method="post" enctype="text/plain" target="f"><input name='{"model":"shop","prompt":"a","x":"'
value='"}'></form>"""


@pytest.fixture(scope="module")
def misled() -> Iterator[Any]:
    """A browser in which names of others have the address of this machine."""
    yield from started_browser("--host-resolver-rules=MAP *.example 127.0.0.1")


@contextmanager
def site() -> Iterator[int]:
    """A web site of someone else; gives its port."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(EVIL.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_a_name_that_is_rebound_to_this_machine_gets_nothing(
    misled: Any, base: Path, root: Path
) -> None:
    with running(base, {"shop": root / "shop"}, ServerOptions(port=0), 2) as server:
        port = address(server)[1]
        page = misled.new_page()
        assert page.goto(f"http://evil.example:{port}/").status == 403
        assert page.evaluate("fetch('/v1/models').then(r => r.status)") == 403
        ask = "fetch('/v1/completions', {method: 'POST', body: '{}'}).then(r => r.status)"
        assert page.evaluate(ask) == 403
        assert page.goto(f"http://localhost:{port}/").status == 200
        assert page.evaluate("fetch('/v1/models').then(r => r.status)") == 200
        body = json.dumps({**TEXT, "max_tokens": 3})
        own = "body => fetch('/v1/completions', {method: 'POST', body, headers: "
        own += "{'Content-Type': 'application/json'}}).then(r => r.status)"
        assert page.evaluate(own, body) == 200
        assert server.figure("lorakit_generated_tokens_total") == 3
        page.close()


def test_a_page_of_another_site_can_neither_ask_nor_read(
    misled: Any, base: Path, root: Path
) -> None:
    with running(base, {"shop": root / "shop"}, ServerOptions(port=0), 2) as server, site() as port:
        url = f"http://127.0.0.1:{address(server)[1]}/v1/completions"
        for origin in (f"http://evil.example:{port}/", f"http://localhost:{port}/"):
            page = misled.new_page()
            page.goto(origin)
            send = """([url, body, mode, type]) => fetch(url, {method: 'POST', mode,
                body: type ? new Blob([body], {type}) : new TextEncoder().encode(body)})
                .then(r => r.type + r.status, () => 'refused')"""
            for mode in ("no-cors", "cors"):
                for kind in ("", "text/plain", "application/x-www-form-urlencoded"):
                    found = page.evaluate(send, [url, json.dumps(TEXT), mode, kind])
                    assert found == ("opaque0" if mode == "no-cors" else "refused")
            json_type = [url, json.dumps(TEXT), "cors", "application/json"]
            assert page.evaluate(send, json_type) == "refused"
            page.evaluate("url => navigator.sendBeacon(url, '{}')", url)
            with page.expect_response(lambda response: response.url == url) as reply:
                page.evaluate(
                    "url => { document.forms[0].action = url; document.forms[0].submit() }", url
                )
            assert reply.value.status == 403
            reads = "url => fetch(url).then(r => r.text(), () => 'refused')"
            assert page.evaluate(reads, url.replace("completions", "models")) == "refused"
            page.close()
        assert server.figure("lorakit_prompt_tokens_total") == 0
        metrics = server.http.get("/metrics").text
        assert 'route="/v1/completions",status="200"' not in metrics
