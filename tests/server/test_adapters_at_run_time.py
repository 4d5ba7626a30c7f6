"""Adapters that come and go while the server answers, and those that it must not take."""

import json
import os
import pickle
import random
import shutil
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file

from lorakit.server.errors import install
from lorakit.server.options import ServerOptions
from matrix import few
from random_adapters import make_adapter
from served import Running, in_background, refused, running, until
from tiny import save_tiny_model

ADMIN = {"Authorization": "Bearer admin-key"}


@pytest.fixture(scope="module")
def shelf(
    base: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, Path]]:
    """A server that loads adapters from a folder, for all tests of this module."""
    folder = tmp_path_factory.mktemp("shelf") / "adapters"
    folder.mkdir()
    options = ServerOptions(port=0, admin_key="admin-key", adapter_root=folder)
    with running(base, {"shop": root / "shop"}, options, max_rows=4) as server:
        yield server, folder


@pytest.fixture
def own_root(root: Path, shelf: tuple[Running, Path]) -> Path:
    """A copy of the adapters' folder, to write into; nothing else lies there or beside it."""
    folder = shelf[1]
    for path in (*folder.iterdir(), *(one for one in folder.parent.iterdir() if one != folder)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return Path(shutil.copytree(root, folder, dirs_exist_ok=True))


@pytest.fixture
def open_shelf(shelf: tuple[Running, Path], own_root: Path) -> Running:
    """The server with `shop` alone, as it lies there."""
    server = shelf[0]
    for name in names(server):
        if name != "shop":
            assert unload(server, name).status_code == 200
    assert load(server, "shop", "shop", load_inplace=True).status_code == 200
    assert server.engine.running() == 0
    return server


def load(server: Running, name: str, path: str | Path, **fields: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return server.post("/v1/load_lora_adapter", body, headers=ADMIN)


def unload(server: Running, name: str) -> httpx.Response:
    return server.post("/v1/unload_lora_adapter", {"lora_name": name}, headers=ADMIN)


def text(server: Running, model: str) -> str:
    response = server.complete(model=model, max_tokens=12)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def names(server: Running) -> list[str]:
    return [card.id for card in server.openai.models.list().data][1:]


def test_an_adapter_is_loaded_answers_and_is_unloaded(open_shelf: Running, own_root: Path) -> None:
    shop = text(open_shelf, "shop")
    refused(open_shelf.complete(model="poet"), 404)
    reply = load(open_shelf, "poet", "poet")
    assert reply.status_code == 200
    assert reply.text == "Success: LoRA adapter 'poet' added successfully."
    assert names(open_shelf) == ["shop", "poet"]
    poet = text(open_shelf, "poet")
    assert poet != shop
    assert load(open_shelf, "by-path", own_root / "poet").status_code == 200
    assert text(open_shelf, "by-path") == poet
    assert open_shelf.figure("lorakit_adapters ") == 3
    reply = unload(open_shelf, "poet")
    assert reply.text == "Success: LoRA adapter 'poet' removed successfully."
    refused(open_shelf.complete(model="poet"), 404)
    assert names(open_shelf) == ["shop", "by-path"]
    assert text(open_shelf, "shop") == shop


def test_an_adapter_is_replaced_only_when_that_is_asked_for(
    open_shelf: Running, own_root: Path, base: Path
) -> None:
    old = text(open_shelf, "shop")
    make_adapter(base, own_root / "next", seed=9)
    error = refused(load(open_shelf, "shop", "next"), 400)
    assert "load_inplace: true" in error["message"]
    assert text(open_shelf, "shop") == old
    reply = load(open_shelf, "shop", "next", load_inplace=True)
    assert reply.text == "Success: LoRA adapter 'shop' replaced successfully."
    assert text(open_shelf, "shop") != old
    assert load(open_shelf, "shop", "shop", load_inplace=True).status_code == 200
    assert text(open_shelf, "shop") == old


@pytest.mark.parametrize("change", ["replace", "unload"])
def test_running_answers_finish_on_the_adapter_that_they_began_with(
    open_shelf: Running, change: str
) -> None:
    asked: dict[str, Any] = {"model": "shop", "prompt": "hello", "temperature": 0}
    whole = open_shelf.complete(max_tokens=500).json()["choices"][0]["text"]
    stream = open_shelf.openai.completions.create(**asked, max_tokens=500, stream=True)
    parts = [next(stream).choices[0].text]
    if change == "replace":
        assert load(open_shelf, "shop", "poet", load_inplace=True).status_code == 200
    else:
        assert unload(open_shelf, "shop").status_code == 200
    assert open_shelf.engine.running() == 1, "the answer was over too early to prove anything"
    parts += [chunk.choices[0].text for chunk in stream]
    assert "".join(parts) == whole


def test_an_adapter_that_went_since_it_was_looked_up_is_not_found(open_shelf: Running) -> None:
    app = FastAPI()
    install(app)

    @app.get("/chat")
    def uses_it_late() -> str:
        assert unload(open_shelf, "shop").status_code == 200
        return str(open_shelf.engine.tokenizer_of("shop"))

    error = refused(TestClient(app).get("/chat"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_what_is_not_loaded_cannot_be_unloaded(open_shelf: Running) -> None:
    error = refused(unload(open_shelf, "poet"), 404)
    assert error["code"] == "model_not_found"
    refused(unload(open_shelf, open_shelf.engine.model_name), 404)


BAD_NAMES = ["../shop", "a b", "", "a\u0000b", "/shop", ".", "a" * 201, "a\nb"]
BAD_NAMES += [
    "a\u202eb",
    "a\u200bb",
    "\u001b[2J",
    "a\u009bb",
    "\u3164",
    "\u0301a",
    "a\u2028b",
    "a\u00a0b",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_cannot_be_asked_for_is_refused(open_shelf: Running, name: str) -> None:
    assert refused(load(open_shelf, name, "poet"), 400)["param"] == "lora_name"
    assert names(open_shelf) == ["shop"]


@pytest.mark.parametrize("name", ["输出", "आउटपुट", "v2-출력/ключ_٣", "Caf\u00e9"])
def test_a_name_may_be_of_any_script(open_shelf: Running, name: str) -> None:
    assert load(open_shelf, unicodedata.normalize("NFD", name), "poet").status_code == 200
    assert names(open_shelf) == ["shop", name]
    poet = text(open_shelf, name)
    assert poet == text(open_shelf, unicodedata.normalize("NFD", name)) != text(open_shelf, "shop")
    assert open_shelf.http.get(f"/v1/models/{quote(name)}").json()["id"] == name
    assert open_shelf.openai.models.retrieve(name).id == name
    chunks = open_shelf.openai.completions.create(
        model=name, prompt="hello", max_tokens=12, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == poet
    assert open_shelf.http.get("/metrics").status_code == 200
    assert "loaded already" in refused(load(open_shelf, name, "poet"), 400)["message"]
    assert unload(open_shelf, name).status_code == 200
    assert refused(open_shelf.complete(model=name), 404)["param"] == "model"


def test_the_bases_name_stays_the_bases(open_shelf: Running) -> None:
    refused(load(open_shelf, open_shelf.engine.model_name, "poet", load_inplace=True), 400)


@pytest.mark.parametrize(
    "path",
    [
        ".",
        "..",
        "../adapters",
        "../outside",
        "poet/../../outside",
        "link",
        "loop",
        "/etc",
        "/",
        "none",
        "~",
        "poet/adapter_config.json",
        "poet\u0000",
        "a" * 4000,
    ],
)
def test_a_path_that_leaves_the_root_is_refused_in_the_same_words_as_one_that_is_not_there(
    open_shelf: Running, own_root: Path, path: str
) -> None:
    shutil.copytree(own_root / "poet", own_root.parent / "outside")
    (own_root / "link").symlink_to(own_root.parent / "outside")
    (own_root / "loop").symlink_to(own_root / "loop")
    error = refused(load(open_shelf, "x", path), 400)
    assert error["message"].startswith("there is no folder '")
    assert error["message"].endswith("' below the server's --adapter-root")
    absolute = own_root.parent / "outside"
    assert "there is no folder" in refused(load(open_shelf, "x", absolute), 400)["message"]


def test_a_link_inside_the_root_is_as_good_as_the_folder(
    open_shelf: Running, own_root: Path
) -> None:
    (own_root / "latest").symlink_to(own_root / "poet")
    assert load(open_shelf, "latest", "latest").status_code == 200


def test_files_that_are_links_out_of_the_root_are_refused(
    open_shelf: Running, own_root: Path
) -> None:
    outside = own_root.parent / "secret.safetensors"
    weights = own_root / "poet" / "adapter_model.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    assert "lies outside" in refused(load(open_shelf, "x", "poet"), 400)["message"]


class _Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def _as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with (folder / "adapter_model.bin").open("wb") as file:
        pickle.dump(_Trap(folder / "sprung"), file)


def _disguised_pickle(folder: Path) -> None:
    _as_pickle(folder)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")


def _cut_short(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _without_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _broken_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def _template_of_no_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")


def _broken_record(folder: Path) -> None:
    (folder / "lorakit.json").write_bytes(b"\xff{")


def _config_of_wrong_types(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"r": {"a": []}, "target_modules": 5}')


def _folders_for_files(folder: Path) -> None:
    for file in list(folder.iterdir()):
        file.unlink()
        file.mkdir()


def _header_that_lies(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes((2**62).to_bytes(8, "little") + weights.read_bytes()[8:])


def _pipe(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        _as_pickle,
        _disguised_pickle,
        _cut_short,
        _without_config,
        _broken_config,
        _template_of_no_text,
        _broken_record,
        _config_of_wrong_types,
        _folders_for_files,
        _header_that_lies,
        _pipe,
        _empty,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_adapter_is_a_bad_request_and_harms_no_other(
    open_shelf: Running, own_root: Path, damage: Any
) -> None:
    before = text(open_shelf, "shop")
    damage(own_root / "poet")
    assert refused(load(open_shelf, "poet", "poet"), 400)["param"] == "lora_path"
    assert not list(own_root.rglob("sprung"))
    assert names(open_shelf) == ["shop"]
    assert text(open_shelf, "shop") == before


def test_an_adapter_of_another_base_is_a_bad_request(
    open_shelf: Running, own_root: Path, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", hidden_size=64)
    make_adapter(other, own_root / "stranger")
    assert "does not fit" in refused(load(open_shelf, "x", "stranger"), 400)["message"]
    assert names(open_shelf) == ["shop"]


def test_a_kind_of_adapter_that_cannot_be_mixed_is_a_bad_request(
    open_shelf: Running, own_root: Path, base: Path
) -> None:
    make_adapter(base, own_root / "biases", bias="all")
    assert "biases" in refused(load(open_shelf, "x", "biases"), 400)["message"]
    make_adapter(base, own_root / "dora", use_dora=True)
    assert load(open_shelf, "dora", "dora").status_code == 200
    assert open_shelf.complete(model="dora").json()["usage"]["completion_tokens"] > 0


def test_a_chat_is_in_the_template_that_its_adapter_came_with(
    open_shelf: Running, own_root: Path
) -> None:
    (own_root / "poet" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}a:"
    )
    assert load(open_shelf, "poet", "poet").status_code == 200
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    written = "s: be brief\nu: hello\na:"
    chat = {"model": "poet", "messages": messages, "max_tokens": 12, "temperature": 0}
    reply = open_shelf.post("/v1/chat/completions", chat).json()
    same = open_shelf.complete(model="poet", prompt=written, max_tokens=12).json()
    assert reply["choices"][0]["message"]["content"] == same["choices"][0]["text"]
    assert reply["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]
    assert same["usage"]["prompt_tokens_details"]["cached_tokens"] == len(written)
    other = open_shelf.post("/v1/chat/completions", {**chat, "model": "shop"}).json()
    assert other["usage"]["prompt_tokens"] != reply["usage"]["prompt_tokens"]


def test_loading_in_a_loop_does_not_disturb_what_is_answered(
    open_shelf: Running, own_root: Path
) -> None:
    answer = in_background(open_shelf, max_tokens=800)
    until(lambda: open_shelf.engine.running() == 1)
    for _ in range(5):
        assert load(open_shelf, "poet", "poet").status_code == 200
        assert open_shelf.complete(model="poet").status_code == 200
        assert unload(open_shelf, "poet").status_code == 200
    assert answer() == 200


def test_without_the_options_for_it_nothing_is_loaded_and_it_says_what_to_start_with(
    served: Running, serve: Any
) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        error = refused(served.post(path, {}, headers=ADMIN), 403)
        assert "start lorakit serve with --admin-key and --adapter-root" in error["message"]
    rootless = serve(admin_key="admin-key")
    assert "--adapter-root" in refused(load(rootless, "x", "poet"), 403)["message"]
    assert unload(rootless, "shop").status_code == 200


def test_an_adapter_whose_values_overflow_fails_its_own_answers_alone(
    open_shelf: Running, own_root: Path, base: Path
) -> None:
    shop = text(open_shelf, "shop")
    path = make_adapter(base, own_root / "huge", seed=3) / "adapter_model.safetensors"
    save_file({key: tensor * 1e30 for key, tensor in load_file(path).items()}, path)
    assert load(open_shelf, "huge", "huge").status_code == 200
    beside = in_background(open_shelf, max_tokens=300)
    for temperature in (0, 1):
        error = refused(open_shelf.complete(model="huge", temperature=temperature), 500)
        assert (error["type"], error["code"]) == ("server_error", "answer_failed")
        assert "NaN or Inf" in error["message"]
    with pytest.raises(openai.APIError, match="NaN or Inf"):
        list(open_shelf.openai.completions.create(model="huge", prompt="a", stream=True))
    assert beside() == 200
    assert open_shelf.http.get("/health").status_code == 200
    assert text(open_shelf, "shop") == shop


ENDLESS = r"(?=.)(?:(?:\w+\.?)+_?)+!"


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_backtracks_without_end_is_a_bad_request_and_delays_no_one(
    open_shelf: Running, own_root: Path, field: str
) -> None:
    shop = text(open_shelf, "shop")
    path = own_root / "poet" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: {ENDLESS: 2}}))
    replies: list[tuple[httpx.Response, float]] = []

    def ask() -> None:
        begun = time.monotonic()
        reply = httpx.post(
            f"{open_shelf.url}/v1/load_lora_adapter",
            json={"lora_name": "x", "lora_path": "poet"},
            headers=ADMIN,
            timeout=60,
        )
        replies.append((reply, time.monotonic() - begun))

    thread = threading.Thread(target=ask)
    thread.start()
    waits = []
    while thread.is_alive():
        begun = time.monotonic()
        assert open_shelf.http.get("/health").status_code == 200
        waits.append(time.monotonic() - begun)
        time.sleep(0.05)
    ((reply, seconds),) = replies
    error = refused(reply, 400)
    assert (error["param"], repr(ENDLESS) in error["message"]) == ("lora_path", True)
    assert seconds < 60  # a second of processor time, on a machine that may be busy
    assert len(waits) > 3, "it was over too early to prove anything"
    assert max(waits) < 10
    assert text(open_shelf, "shop") == shop


@pytest.mark.parametrize("loads", few([20, 120], 20))
def test_a_link_that_takes_a_files_place_while_it_is_read_never_leads_out_of_the_root(
    open_shelf: Running, own_root: Path, base: Path, loads: int
) -> None:
    inside = text(open_shelf, "shop")
    outside = make_adapter(base, own_root.parent / "outside", seed=7)
    name = "adapter_model.safetensors"
    victim, spare, link = own_root / "shop" / name, own_root / "spare", own_root / "link"
    stop, chance = threading.Event(), random.Random(1)

    def swap() -> None:
        while not stop.is_set():
            link.symlink_to(outside / name)
            spare.hardlink_to(victim)
            link.replace(victim)
            time.sleep(chance.random() / 500)
            spare.replace(victim)
            time.sleep(chance.random() / 50)

    thread = threading.Thread(target=swap)
    thread.start()
    statuses: list[int] = []
    try:
        for _ in range(loads):
            reply = load(open_shelf, "new", "shop", load_inplace=True)
            statuses.append(reply.status_code)
            if reply.status_code == 200:
                assert text(open_shelf, "new") == inside
    finally:
        stop.set()
        thread.join()
    assert set(statuses) <= {200, 400}
    assert statuses.count(200) > loads / 20
