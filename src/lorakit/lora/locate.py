"""Where an adapter's folder is: on this machine, or on the hub, from and to which it is copied.

What a folder holds is `checkpoint.py`'s; here are only the names of its files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lorakit.errors import InputError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_NAME = "adapter_model.bin"
"""What PEFT wrote before it wrote safetensors; it is read and never written."""
INITIAL_NAME = "initial_factors.safetensors"
"""The factors that PiSSA and OLoRA started from, which PEFT's files do not have."""


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
