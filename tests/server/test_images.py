"""Pictures in chats: shown to the model with any adapter, counted, and refused one by one."""

from __future__ import annotations

import base64
import json
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorakit import LoraConfig, get_peft_model
from lorakit.data.conversations import IMAGE
from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.engine.picture_prompt import prompt_row
from lorakit.engine.sampling import Sampling
from lorakit.engine.shown import shown_text
from lorakit.models.load import load_for_task
from lorakit.server.options import Limits, ServerOptions
from served import Running, refused, serving
from tiny_pictures import COLORS, save_tiny_idefics3

CHATS = "/v1/chat/completions"
ADAPTERS = {"says": "language", "sees": "language,projector", "looks": "vision"}
LIMITS = Limits(images=4, image_pixels=100_000, image_bytes=100_000)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shown(color: str = "red", size: tuple[int, int] = (12, 16)) -> str:
    return data_url(encoded(Image.new("RGB", size, COLORS[color])))


def asking(*urls: Any, text: str = "which?") -> list[dict[str, Any]]:
    parts = [
        {"type": "image_url", "image_url": {"url": url} if isinstance(url, str) else url}
        for url in urls
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def asked_of(model: str, messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0, **fields}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("served-pictures")
    save_tiny_idefics3(folder / "base")
    for seed, (name, parts) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        model = load_for_task("CAUSAL_LM", str(folder / "base"), "float32", device="cpu").model
        config = LoraConfig(r=4, target_modules=f"all-linear[{parts}]", init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(folder / name)
    adapters = {name: folder / name for name in ADAPTERS}
    engine = open_engine(str(folder / "base"), adapters, dtype="float32", max_rows=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    with serving(engine, ServerOptions(port=0, limits=LIMITS)) as server:
        yield server


def test_answers_are_the_engines_with_mixed_adapters_streamed_and_whole(server: Running) -> None:
    engine, base = server.engine, server.engine.model_name
    pictures = [(shown("red"),), (shown("blue"), shown("green")), ()]
    wanted = {}
    for name in (None, *ADAPTERS):
        for some in pictures:
            tokenizer = engine.tokenizer_of(name)
            parts = [{"type": IMAGE, IMAGE: one} for one in some]
            content: Any = [*parts, {"type": "text", "text": "which?"}] if some else "which?"
            messages = [{"role": "user", "content": content}]
            row = prompt_row(shown_text(messages, tokenizer), messages, tokenizer)
            pieces = engine.submit(row.input_ids, name, Sampling(max_new_tokens=4), row.pictures)
            wanted[name or base, some] = "".join(p.text for p in pieces), len(row.input_ids)
    lengths = [tokens for _, tokens in wanted.values()][:3]
    assert lengths[1] - lengths[0] == lengths[0] - lengths[2]  # as many for each picture

    def whole(key: Any) -> tuple[str, int]:
        name, some = key
        reply = server.openai.chat.completions.create(**asked_of(name, asking(*some)))
        return reply.choices[0].message.content or "", reply.usage.prompt_tokens

    def streamed(key: Any) -> tuple[str, int]:
        name, some = key
        options = {"stream": True, "stream_options": {"include_usage": True}}
        reply = server.openai.chat.completions.create(**asked_of(name, asking(*some), **options))
        chunks = list(reply)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        return text, chunks[-1].usage.prompt_tokens

    keys = [*wanted] * 2
    with ThreadPoolExecutor(len(keys)) as pool:
        assert list(pool.map(whole, keys)) == [wanted[key] for key in keys]
        assert list(pool.map(streamed, wanted)) == [*wanted.values()]


def test_answers_to_one_picture_share_its_prompt_and_other_pictures_are_looked_at(
    server: Running,
) -> None:
    fields = {"temperature": 1.5, "max_tokens": 6, "logprobs": True}
    found = {}
    for color in ("red", "blue", "green"):  # whose prompts have the same tokens
        asked = asked_of("sees", asking(shown(color)), **fields)
        reply = server.post(CHATS, {**asked, "n": 3, "seed": 5}).json()
        alone = [server.post(CHATS, {**asked, "seed": 5 + i}).json() for i in range(3)]
        for choice, other in zip(reply["choices"], alone, strict=True):
            assert choice["message"] == other["choices"][0]["message"]
        logprobs = [c["logprobs"]["content"][0]["logprob"] for c in reply["choices"]]
        found[color] = logprobs
        usage = [one["usage"] for one in (reply, *alone)]
        assert [u["prompt_tokens_details"]["cached_tokens"] for u in usage] == [0] * 4
    assert len(set(map(str, found.values()))) == 3


def test_a_conversation_goes_on_and_forms_of_clients_are_taken(server: Running) -> None:
    first = asking({"url": shown(), "detail": "auto"})
    reply = server.openai.chat.completions.create(**asked_of("says", first))
    answer = reply.choices[0].message.model_dump()
    longer = [*first, {**answer, "content": "red"}, *asking(shown("blue"))]
    more = server.post(CHATS, asked_of("says", longer)).json()
    assert more["usage"]["prompt_tokens"] > reply.usage.prompt_tokens
    plain = [{"type": "image_url", "image_url": shown()}, {"type": "text", "text": "which?"}]
    other = server.post(CHATS, asked_of("says", [{"role": "user", "content": plain}])).json()
    assert other["usage"]["prompt_tokens"] == reply.usage.prompt_tokens
    assert other["choices"][0]["message"]["content"] == reply.choices[0].message.content
    broken = shown().rstrip("=")  # in lines, and without padding
    broken = broken[:60] + "\n" + broken[60:90] + "\r\n" + broken[90:]
    other = server.post(CHATS, asked_of("says", asking(broken))).json()
    assert other["choices"][0]["message"]["content"] == reply.choices[0].message.content
    kinds = {"image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}
    for kind, name in kinds.items():
        data = encoded(Image.new("RGB", (12, 16), COLORS["red"]), name)
        reply = server.post(CHATS, asked_of("says", asking(data_url(data, kind))))
        assert reply.status_code == 200, reply.text
    for card in server.http.get("/v1/models").json()["data"]:
        assert card["input_modalities"] == ["text", "image"]


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes that claims to be huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


RED = Image.new("RGB", (40, 40), COLORS["red"])
NOISE = Image.effect_noise((300, 300), 90)
FRAMES = [Image.new("RGB", (8, 8), color) for color in COLORS.values()]
BAD: dict[str, tuple[Any, str]] = {
    "truncated": (data_url(encoded(RED)[:70]), "image_parse_error"),
    "damaged inside": (data_url(encoded(NOISE)[:9000] + b"\0" * 999), "image_parse_error"),
    "no picture": (data_url(b"hello, I am text"), "unsupported_image_media_type"),
    "empty": ("data:image/png;base64,", "empty_image_file"),
    "base64": ("data:image/png;base64,@@@", "invalid_base64_image"),
    "a format that is not taken": (data_url(encoded(RED, "TIFF")), "unsupported_image_media_type"),
    "a bomb": (data_url(bomb(60_000, 60_000)), "image_too_large"),
    "a smaller bomb": (data_url(bomb(9000, 9000)), "image_too_large"),
    "bytes": (data_url(b"\x89PNG" + b"\0" * 150_000), "image_file_too_large"),
    "scans without end": (
        data_url(encoded(RED, "JPEG", progressive=True, comment=b"\xff\xda" * 50)),
        "image_parse_error",
    ),
    "animated": (
        data_url(encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])),
        "invalid_image_format",
    ),
    "an address of the web": ("https://example.org/cat.png", "invalid_image_url"),
    "a file": ("file:///etc/passwd", "invalid_image_url"),
    "a path": ("/etc/passwd", "invalid_image_url"),
    "less detail": ({"url": shown(), "detail": "low"}, "unsupported_value"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_picture_is_its_own_requests_error(server: Running, case: str) -> None:
    url, code = BAD[case]
    good = partial(server.post, CHATS, asked_of("says", asking(shown("green"))))
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(good)
        messages = [{"role": "system", "content": "look"}, *asking(shown(), url)]
        for stream in (False, True):
            reply = server.post(CHATS, asked_of("sees", messages, stream=stream))
            error = refused(reply, 400)
            assert (error["code"], error["type"]) == (code, "invalid_request_error")
            assert error["param"].startswith("messages[1].content[1]")
            assert "/etc" not in error["message"]
        assert beside.result().status_code == 200
    assert good().status_code == 200


def test_more_than_is_taken_is_refused(server: Running) -> None:
    error = refused(server.post(CHATS, asked_of("says", asking(*[shown()] * 5))), 400)
    assert error["code"] == "too_many_images"
    large = shown("red", (200, 200))  # three of them have too many pixels together
    assert server.post(CHATS, asked_of("says", asking(large, large))).status_code == 200
    error = refused(server.post(CHATS, asked_of("says", asking(large, large, large))), 400)
    assert error["code"] == "image_too_large"
    assert error["param"] == "messages[0].content[2]"
    long = asking(shown(), text="word " * 5000)
    error = refused(server.post(CHATS, asked_of("says", long)), 400)
    assert error["code"] == "context_length_exceeded"
    written = [*asking(shown()), {"role": "assistant", "content": asking(shown())[0]["content"]}]
    error = refused(server.post(CHATS, asked_of("says", [*written, *asking(shown())])), 400)
    assert error["param"] == "messages[1]"
    pooled = {"model": "says", "messages": [*asking(shown()), {"role": "assistant", "content": ""}]}
    assert "not scored" in refused(server.post("/pooling", pooled), 400)["message"]
    marks = asking(shown(), text="what is <image> for?")
    assert refused(server.post(CHATS, asked_of("says", marks)), 400)["param"] == "messages"


def test_a_model_of_text_alone_says_so(served: Running) -> None:
    error = refused(served.post(CHATS, asked_of("shop", asking(shown()))), 400)
    assert error["param"] == "messages[0].content[0]"
    assert "text alone" in error["message"]
    cards = served.http.get("/v1/models").json()["data"]
    assert {tuple(card["input_modalities"]) for card in cards} == {("text",)}


def test_bodies_together_take_bounded_memory(engine: Engine) -> None:
    limits = Limits(bodies_bytes=60_000)
    with serving(engine, ServerOptions(port=0, limits=limits)) as server:
        large = asking(data_url(encoded(NOISE)))
        error = refused(server.post(CHATS, asked_of("says", large)), 429)
        assert error["code"] == "rate_limit_exceeded"
        assert server.post(CHATS, asked_of("says", asking(shown()))).status_code == 200


@pytest.fixture(scope="module")
def web() -> Iterator[tuple[str, list[str]]]:
    """A host of pictures on this machine, and what it was asked for."""
    asked: list[str] = []
    picture = encoded(Image.new("RGB", (12, 16), COLORS["red"]))

    class Host(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            if self.path == "/away.png":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
                return
            found = {"/red.png": picture, "/large.png": bytes(200_000), "/page.png": b"<html>"}
            data = found.get(self.path)
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *_: Any) -> None:
            pass

    host = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{host.server_port}", asked
    host.shutdown()
    host.server_close()


@pytest.fixture(scope="module")
def fetching(engine: Engine) -> Iterator[Callable[..., Running]]:
    with serving(engine, ServerOptions(port=0, limits=LIMITS, fetch_from=("127.0.0.1",))) as server:
        yield server


def test_pictures_of_named_hosts_are_fetched(fetching: Running, web: tuple[str, list[str]]) -> None:
    address, _ = web
    sent = fetching.post(CHATS, asked_of("sees", asking(shown("red")))).json()
    found = fetching.post(CHATS, asked_of("sees", asking(f"{address}/red.png"))).json()
    assert found["choices"] == sent["choices"]
    assert found["usage"] == sent["usage"]
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 0  # pictures are looked at
    for name in ("none.png", "large.png", "away.png"):
        error = refused(fetching.post(CHATS, asked_of("sees", asking(f"{address}/{name}"))), 400)
        assert error["code"] == "failed_to_download_image", name
        assert error["param"] == "messages[0].content[0]"
    error = refused(fetching.post(CHATS, asked_of("sees", asking(f"{address}/page.png"))), 400)
    assert error["code"] == "unsupported_image_media_type"
    elsewhere = asking("http://example.org/cat.png")
    error = refused(fetching.post(CHATS, asked_of("sees", elsewhere)), 400)
    assert error["code"] == "failed_to_download_image"


PRIVATE = ["127.0.0.1", "localhost", "[::1]", "127.1", "0.0.0.0", "2130706433", "0x7f000001"]
PRIVATE += ["[::ffff:7f00:1]", "169.254.169.254", "10.0.0.1", "192.168.1.1", "user:pass@127.0.0.1"]
WITHOUT_PORT = ["http://[::ffff:127.0.0.1]/red.png", "http://a b/red.png", "http://[::1/red.png"]


def test_no_host_of_the_own_machine_or_network_is_asked(
    engine: Engine, web: tuple[str, list[str]]
) -> None:
    address, asked = web
    port = address.rpartition(":")[2]
    before = len(asked)
    with serving(engine, ServerOptions(port=0, limits=LIMITS, fetch_from=())) as server:
        for url in [*(f"http://{host}:{port}/red.png" for host in PRIVATE), *WITHOUT_PORT]:
            error = refused(server.post(CHATS, asked_of("sees", asking(url))), 400)
            assert error["code"] == "failed_to_download_image", url
            assert "127.0.0.1" not in error["message"]  # which names mean it is not told
    assert len(asked) == before


def test_the_command_takes_the_limits(tmp_path: Path) -> None:
    from command import run_lorakit

    done = run_lorakit(tmp_path, "serve", "--model", "nowhere", "--image-host", "example.org")
    assert done.returncode == 2
    assert "--fetch-images" in done.stderr
    assert json.dumps(done.stderr).count("Traceback") == 0
