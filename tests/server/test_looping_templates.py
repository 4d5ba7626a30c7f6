"""A template of an adapter that loops on some conversations holds up its own requests alone."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit.data import bounded_templates
from served import Running, refused, until

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ADMIN = {"Authorization": "Bearer admin-key"}
CHAT = "/v1/chat/completions"


def chat(server: Running, model: str, content: str) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    return server.post(CHAT, {"model": model, "messages": messages, "max_tokens": 2})


@pytest.fixture
def looping(serve: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Running:
    """A server that has `bad`, whose template loops where somebody says bad."""
    monkeypatch.setattr(bounded_templates, "SECONDS", 2.0)
    own_root = Path(shutil.copytree(root, tmp_path / "adapters"))
    shutil.copytree(root / "poet", own_root / "bad")
    (own_root / "bad/chat_template.jinja").write_text(
        "{% if messages[0].content == 'bad' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
    )
    server: Running = serve(admin_key="admin-key", adapter_root=own_root)
    body = {"lora_name": "bad", "lora_path": "bad"}
    assert server.post("/v1/load_lora_adapter", body, headers=ADMIN).status_code == 200
    return server


def test_what_loops_is_refused_and_everything_else_goes_on_meanwhile(
    looping: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(looping, "bad", "good").status_code == 200
    monkeypatch.setattr(bounded_templates, "SECONDS", 4.0)
    replies: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: replies.append(chat(looping, "bad", "bad")))
    thread.start()
    until(lambda: bool(bounded_templates._pool()._busy))
    for _ in range(1):
        assert chat(looping, "shop", "bad").status_code == 200
        assert looping.complete(max_tokens=2).status_code == 200
        body = {"lora_name": "poet", "lora_path": "poet", "load_inplace": True}
        assert looping.post("/v1/load_lora_adapter", body, headers=ADMIN).status_code == 200
    assert replies == []
    thread.join(60)
    assert "takes more than 4 s" in refused(replies[0], 400)["message"]
    assert chat(looping, "bad", "good").status_code == 200


def test_an_adapter_whose_template_always_loops_is_refused(
    looping: Running, tmp_path: Path
) -> None:
    (tmp_path / "adapters/bad/chat_template.jinja").write_text(LOOP)
    body = {"lora_name": "worse", "lora_path": "bad"}
    begin = time.monotonic()
    error = refused(looping.post("/v1/load_lora_adapter", body, headers=ADMIN), 400)
    assert time.monotonic() - begin < 60
    assert "the chat template takes more than 2 s" in error["message"]
    assert looping.complete(max_tokens=2).status_code == 200


STUCK = """
import sys, time
from pathlib import Path
from lorakit.engine.open_engine import open_engine
from lorakit.server.options import ServerOptions
from lorakit.server.run import run

engine = open_engine(sys.argv[1], {}, dtype="float32")
engine._model.register_forward_pre_hook(lambda *_: time.sleep(1000))
run(engine, ServerOptions(port=0, drain=0.2), lambda a: print(a, flush=True), exits=True)
"""


@pytest.mark.exhaustive
def test_a_thread_that_is_stuck_does_not_keep_the_process_alive(base: Path) -> None:
    command = [sys.executable, "-c", STUCK, str(base)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        body = {"model": str(base), "prompt": "a", "max_tokens": 2}
        statuses: list[int] = []

        def ask() -> None:
            statuses.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: "lorakit_answers_running 1" in httpx.get(f"{url}/metrics").text)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
        assert time.monotonic() - begin < 60
        thread.join(5)
        assert statuses == [503]
        assert process.returncode == 1
        assert said.decode().startswith("error: something was stuck")
