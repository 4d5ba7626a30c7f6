"""Files that others change while they are served or read: answers stay right, nobody crashes."""

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, normalizers

from answered import alone, tokens
from lorakit.adapters.private_copy import private_copy
from lorakit.below import Folder
from lorakit.engine.engine import Engine
from lorakit.engine.open_engine import open_engine
from lorakit.engine.sampling import Sampling
from lorakit.errors import InputError
from matrix import few
from random_adapters import make_adapter
from tiny import byte_tokenizer

Start = Callable[..., Engine]
GREEDY = Sampling(max_new_tokens=12, logprobs=0)
PROMPT = list(range(30, 50))
LIMIT = 1 << 24


def overwrite(path: Path) -> None:
    """In place, as `cp` over a file does: who maps it sees other values."""
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.seek(size // 4)
        file.write(b"\x11" * (size - size // 4))


def cut(path: Path) -> None:
    os.truncate(path, 100)


@pytest.mark.parametrize("change", [overwrite, cut])
def test_what_is_served_does_not_depend_on_files_any_more(
    base: Path, adapters: dict[str, Path], tmp_path: Path, change: Callable[[Path], None]
):
    own_base = Path(shutil.copytree(base, tmp_path / "base"))
    shop = Path(shutil.copytree(adapters["shop"], tmp_path / "shop"))
    expected = {
        name: alone(base, folder, PROMPT, 12, [257])
        for name, folder in (("shop", adapters["shop"]), (None, None))
    }
    engine = open_engine(str(own_base), {"shop": shop}, dtype="float32")
    try:
        for folder in (own_base, shop):
            for path in folder.iterdir():
                change(path)
        for name, right in expected.items():
            assert tokens(engine.submit(PROMPT, name, GREEDY)) == right
    finally:
        engine.close()


def test_a_merged_adapter_does_not_depend_on_files_any_more(
    base: Path, adapters: dict[str, Path], tmp_path: Path
):
    own_base = Path(shutil.copytree(base, tmp_path / "base"))
    shop = Path(shutil.copytree(adapters["shop"], tmp_path / "shop"))
    engine = open_engine(str(own_base), {"shop": shop}, dtype="float32", merged=True)
    try:
        for path in (*own_base.iterdir(), *shop.iterdir()):
            cut(path)
        right = alone(base, adapters["shop"], PROMPT, 12, [257])
        assert tokens(engine.submit(PROMPT, None, GREEDY)) == right
    finally:
        engine.close()


def test_an_adapter_that_is_read_again_is_the_one_that_was_registered(
    start: Start, base: Path, adapters: dict[str, Path], tmp_path: Path
):
    folders = {name: Path(shutil.copytree(adapters[name], tmp_path / name)) for name in adapters}
    engine = start(adapters=folders, pool_bytes=1)  # so that only the last one stays
    weights = folders["shop"] / "adapter_model.safetensors"
    assert tokens(engine.submit(PROMPT, "shop", GREEDY)) == alone(
        base, adapters["shop"], PROMPT, 12, [257]
    )
    assert tokens(engine.submit(PROMPT, "poet", GREEDY))
    # The same size and the same time of change, and other values.
    before = weights.stat()
    save_file(
        {key: tensor * 2 for key, tensor in load_file(weights).items()}, weights, {"format": "pt"}
    )
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    with pytest.raises(InputError, match="has changed since shop was loaded: load it again"):
        engine.submit(PROMPT, "shop")


def test_an_adapter_that_is_being_rewritten_is_read_whole_or_refused(base: Path, tmp_path: Path):
    """Two versions take turns in one folder, without any order between their two files."""
    versions = [make_adapter(base, tmp_path / f"v{i}", i, r=4, lora_alpha=8 + i) for i in range(2)]
    pairs = {
        (v / "adapter_config.json").read_bytes(): (v / "adapter_model.safetensors").read_bytes()
        for v in versions
    }
    folder = Path(shutil.copytree(versions[0], tmp_path / "live"))
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for version in versions:
                for path in version.iterdir():
                    temporary = folder / f".{path.name}"
                    shutil.copy(path, temporary)
                    temporary.replace(folder / path.name)
                time.sleep(0.02)

    thread = threading.Thread(target=rewrite)
    thread.start()
    whole, refusals = 0, []
    try:
        for _ in range(60):
            try:
                with private_copy(folder, LIMIT) as copied:
                    config = (copied.folder / "adapter_config.json").read_bytes()
                    weights = (copied.folder / "adapter_model.safetensors").read_bytes()
            except InputError as error:
                refusals.append(str(error))
            else:
                # Between two renames a folder is a mixture that stands still, if only for a moment.
                whole += pairs[config] == weights
    finally:
        stop.set()
        thread.join()
    assert whole > 0
    assert all("changes while it is read" in refusal for refusal in refusals)


TOO_LARGE = {
    "adapter_config.json": 16 << 20,
    "lorakit.json": 16 << 20,
    "chat_template.jinja": 1 << 20,
    "tokenizer.json": 64 << 20,
    "adapter_model.safetensors": 1 << 30,
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_files_that_are_too_large_are_refused_before_they_are_read(
    start: Start, adapters: dict[str, Path], tmp_path: Path, name: str
):
    folder = Path(shutil.copytree(adapters["shop"], tmp_path / "large"))
    (folder / name).touch()
    os.truncate(folder / name, TOO_LARGE[name] + 1)  # a hole, which takes no room
    engine = start()
    begin = time.monotonic()
    with pytest.raises(InputError, match=rf"large/{name} is larger than the .* bytes"):
        engine.pool.register("large", folder)
    assert time.monotonic() - begin < 60


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders here")
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "proc"])
def test_what_is_no_file_is_refused_and_holds_up_nobody(
    start: Start, adapters: dict[str, Path], tmp_path: Path, name: str, kind: str
):
    folder = Path(shutil.copytree(adapters["shop"], tmp_path / "odd"))
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "proc":
        path.symlink_to("/proc/self/mem")
    else:
        path.mkdir()
    engine = start()
    for root in (None, tmp_path):
        begin = time.monotonic()
        with pytest.raises(InputError):
            engine.pool.register("odd", folder, root)
        assert time.monotonic() - begin < 60


def test_json_without_end_is_refused(start: Start, adapters: dict[str, Path], tmp_path: Path):
    for name in ("adapter_config.json", "lorakit.json", "tokenizer_config.json", "tokenizer.json"):
        folder = Path(shutil.copytree(adapters["shop"], tmp_path / f"deep-{name}"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
        (folder / name).write_text("[" * 1_000_000)
        with pytest.raises(InputError):
            start().pool.register("deep", folder)


def test_a_tokenizer_of_an_adapter_may_add_tokens_and_nothing_else(
    start: Start, adapters: dict[str, Path], tmp_path: Path
):
    """A pattern of its own could take any time on some texts, for everybody."""
    tokenizer: Any = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("(a+)+$"), "x")
    tokenizer.add_tokens([AddedToken("<new>")])
    folder = Path(shutil.copytree(adapters["shop"], tmp_path / "own"))
    tokenizer.save_pretrained(folder)
    saved = folder / "tokenizer.json"
    # The model has no row for another token: one that a row is free for takes a name of its own.
    values = json.loads(saved.read_text())
    values["added_tokens"] = [
        {**token, "id": 258} if token["content"] == "<new>" else token
        for token in values["added_tokens"]
        if token["id"] != 258
    ]
    saved.write_text(json.dumps(values))
    engine = start()
    with pytest.raises(InputError, match="another normalizer than the base's"):
        engine.pool.register("own", folder)


# --- below a root -------------------------------------------------------------------------------


@pytest.fixture(params=["by descriptors", "by comparing"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to stay below a root; the second is for systems that lack the first."""
    if request.param == "by comparing":
        monkeypatch.setattr(os, "supports_dir_fd", set())
    return str(request.param)


def contents(folder: Path, root: Path, name: str = "adapter_config.json") -> bytes:
    with Folder(folder, root) as opened, os.fdopen(opened.open_file(name), "rb") as file:
        return file.read()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    for place, words in (("root/a", "inside"), ("root/deep/b", "deep"), ("outside", "secret")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "adapter_config.json").write_text(words)
    (tmp_path / "root-beside").mkdir()
    return root


@pytest.mark.usefixtures("way")
def test_what_lies_below_the_root_is_opened(tree: Path):
    (tree / "latest").symlink_to("deep/b")
    (tree / "absolute").symlink_to(tree / "a")
    (tree / "deep/up").symlink_to("../a")
    for name in ("a", "./a", "deep/../a", "absolute", "deep/up", tree / "a"):
        assert contents(Path(name), tree) == b"inside"
    for name in ("deep/b", "latest", "latest/../b"):
        assert contents(Path(name), tree) == b"deep"
    (tree / "linked").mkdir()
    (tree / "linked/adapter_config.json").symlink_to("../a/adapter_config.json")
    assert contents(Path("linked"), tree) == b"inside"
    (tree.parent / "alias").symlink_to(tree)
    assert contents(tree.parent / "alias/a", tree.parent / "alias") == b"inside"


@pytest.mark.usefixtures("way")
def test_what_leads_out_of_the_root_is_not_opened(tree: Path):
    outside = tree.parent / "outside"
    links = {
        "out": outside,
        "up": "../outside",
        "further": "deep/../../outside",
        "loop": "loop",
        "pair": "riap",
        "riap": "pair",
        "self": "/proc/self/cwd",
        "root": "/",
    }
    for name, target in links.items():
        (tree / name).symlink_to(target)
    others = ["", ".", "..", "../outside", "a/../..", "a/../../outside", outside, "/", "none"]
    others += ["a/adapter_config.json", "a\0", "b" * 5000, "../root-beside", "/proc/self/root"]
    for path in (*links, *others):
        with pytest.raises((OSError, ValueError, RuntimeError)):
            contents(Path(path), tree)
    (tree / "a/adapter_config.json").unlink()
    (tree / "a/adapter_config.json").symlink_to(outside / "adapter_config.json")
    with pytest.raises(PermissionError):
        contents(Path("a"), tree)


@pytest.mark.parametrize("swapped", ["file", "folder"])
@pytest.mark.parametrize("times", few([300, 3000], 300))
def test_a_link_that_takes_the_place_of_what_is_read_never_leads_out(
    tree: Path, swapped: str, times: int
):
    victim = tree / "a" if swapped == "folder" else tree / "a/adapter_config.json"
    target = tree.parent / "outside" / ("" if swapped == "folder" else "adapter_config.json")
    spare, link = tree / "spare", tree / "link"
    stop, chance = threading.Event(), random.Random(0)

    def swap() -> None:
        while not stop.is_set():
            link.symlink_to(target)
            victim.rename(spare)
            link.rename(victim)
            victim.unlink()
            spare.rename(victim)
            time.sleep(chance.random() / 5000)  # else the two threads go in step

    thread = threading.Thread(target=swap)
    thread.start()
    read = []
    try:
        for _ in range(times):
            try:
                read.append(contents(Path("a"), tree))
            except OSError:
                read.append(b"")
    finally:
        stop.set()
        thread.join()
    assert set(read) == {b"", b"inside"}
