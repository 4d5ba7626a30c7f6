"""Where an adapter's folder is: on this machine, or on the hub, from and to which it is copied.

`checkpoint.py` reads and writes the folder; here are the names of its files, and the keyword
arguments that scripts pass to PEFT's loaders and savers. PEFT takes any word there, and a misspelt
one is lost; here each is honoured, or taken because PEFT does nothing with it either, or refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lorakit.errors import InputError, did_you_mean

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
"""PEFT's file before it wrote safetensors; it is read and never written."""
INITIAL_NAME = "initial_factors.safetensors"
"""The factors that PiSSA and OLoRA started from, which PEFT's files do not have."""

HUB = (
    "cache_dir",
    "endpoint",
    "etag_timeout",
    "force_download",
    "headers",
    "library_name",
    "library_version",
    "local_files_only",
    "proxies",
    "repo_type",
    "resume_download",
    "revision",
    "token",
    "user_agent",
)
"""Of the hub: they say where an adapter is fetched from, and nothing of a folder."""

PLACEMENT = ("device_map", "max_memory", "offload_dir", "offload_folder", "offload_index")
"""Where PEFT puts a base that is offloaded; here values go where the base's layers are."""

MODEL = ("torch_dtype", "dtype", "trust_remote_code", "use_safetensors")
"""Of the base's own loading: neither PEFT nor lorakit does anything with them for an adapter."""

SAVING = ("max_shard_size", "save_function", "save_peft_format", "token", "variant")
"""Of transformers' `save_pretrained`, which means whole models."""


def locate(model_id: str | Path, subfolder: str | None = None, **hub: Any) -> Path:
    """The local folder of an adapter; an id that is no folder is fetched from the hub.

    Args:
        hub: `revision`, `token`, `cache_dir`, … of `huggingface_hub.snapshot_download`.

    Raises:
        InputError: there is no such folder, and the hub does not give it either.
    """
    folder = Path(model_id)
    looks_like_id = str(model_id).count("/") == 1 and not str(model_id).startswith((".", "/", "~"))
    if not folder.exists() and looks_like_id:
        inside = f"{subfolder}/" if subfolder else ""
        files = [inside + name for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLED_NAME, INITIAL_NAME)]
        try:
            folder = Path(snapshot_download(str(model_id), allow_patterns=files, **hub))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{model_id} is neither a folder here nor an adapter on the hub: {reason}"
            ) from error
    return folder / subfolder if subfolder else folder


def upload(
    folder: str | Path, repo_id: str, private: bool | None, token: str | bool | None, **commit: Any
) -> str:
    """Uploads a folder to a repository of the hub, which is made if it is missing.

    Args:
        commit: of `HfApi.upload_folder`.

    Returns: the address of the commit.
    """
    hub = HfApi(token=token)
    name = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return str(hub.upload_folder(repo_id=name, folder_path=folder, **commit))


def hub_arguments(function: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a loader's further keyword arguments that are for the hub.

    Args:
        function: the loader, for the message.

    Raises:
        TypeError: one is unknown.
    """
    given = dict(given)
    if (token := given.pop("use_auth_token", None)) is not None:  # its name until 2023
        given.setdefault("token", token)
    require_known(function, given, (*HUB, *PLACEMENT, *MODEL))
    taken = inspect.signature(huggingface_hub.snapshot_download).parameters
    return {name: value for name, value in given.items() if name in HUB and name in taken}


def require_known(function: Any, given: Iterable[str], known: Iterable[str] = ()) -> None:
    """Raises TypeError for the first name that is neither known nor an argument of `function`."""
    known = tuple(known)
    own = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    for name in given:
        if name not in known:
            near = did_you_mean(name, [*own, *known])
            raise TypeError(
                f"{function.__name__}() got an unexpected keyword argument '{name}'{near}"
            )


def refuse_offload(ephemeral_gpu_offload: bool) -> None:
    """Raises InputError where it is asked for."""
    if ephemeral_gpu_offload:
        raise InputError("ephemeral_gpu_offload is not supported by lorakit: leave it out")
