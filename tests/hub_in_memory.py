"""A hub of one repository on this machine, with as much of its protocol as the tests need."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants


class Hub(ThreadingHTTPServer):
    """A hub of one repository, `ada/orders`, in memory; as much of the protocol as is needed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.branches: list[str] = []
        self.private: bool | None = None

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.files).encode()).hexdigest()


def use_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, endpoint: str | None) -> None:
    """This process finds the hub at `endpoint`, or is offline where that is None.

    huggingface_hub reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME once, when it is imported.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", endpoint is None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "01"[endpoint is None])
    if endpoint is not None:
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, value: Any) -> None:
        self._bytes(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _bytes(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body, path = self._body(), unquote(self.path.partition("?")[0])
        here = f"http://127.0.0.1:{self.server.server_port}"
        if path == "/api/repos/create":
            wanted = json.loads(body)  # older clients say private, newer ones visibility
            self.server.private = wanted.get("private") or wanted.get("visibility") == "private"
            self._json({"url": f"{here}/ada/orders"})
        elif path.startswith("/api/models/ada/orders/branch/"):
            self.server.branches.append(path.rpartition("/")[2])
            self._json({})
        elif path.startswith("/api/models/ada/orders/preupload/"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif path.startswith("/api/models/ada/orders/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files[line["value"]["path"]] = content
            self._json(
                {"success": True, "commitOid": "0" * 40, "commitUrl": f"{here}/ada/orders/commit/0"}
            )
        elif path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        else:
            self._bytes(b"{}", {}, 404)

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if path.startswith("/api/models/ada/orders/tree/"):
            files = self.server.files.items()
            self._json([{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in files])
        elif path.startswith("/api/models/ada/orders"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": "ada/orders", "sha": self.server.sha, "siblings": siblings})
        elif (name := path.rpartition("/")[2]) in self.server.files and "/resolve/" in path:
            headers = {"ETag": f'"{name}"', "X-Repo-Commit": self.server.sha}
            self._bytes(self.server.files[name], headers)
        else:
            self._bytes(b"{}", {"X-Error-Code": "RepoNotFound"}, 404)

    do_HEAD = do_GET  # noqa: N815 (http.server's name)
