"""Keyword arguments that scripts pass to PEFT's loaders and savers, beyond the named ones.

PEFT takes any word there, and a misspelt one is lost. Here each is honoured, or taken because PEFT
does nothing with it either, or refused with the nearest name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lorakit.errors import InputError, did_you_mean

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

Value = TypeVar("Value")


def hub_arguments(function: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the further keyword arguments of a loader is for the hub.

    Args:
        function: the loader, for the message.

    Raises:
        TypeError: one is unknown.
    """
    given = dict(given)
    if (token := given.pop("use_auth_token", None)) is not None:  # its name until 2023
        given.setdefault("token", token)
    require_known(function, given, (*HUB, *PLACEMENT, *MODEL))
    from huggingface_hub import snapshot_download

    taken = inspect.signature(snapshot_download).parameters
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


def renamed(
    tensors: Mapping[str, Value], key_mapping: Mapping[str, str] | None, prefix: str
) -> dict[str, Value]:
    """The tensors of a file under other keys: of each, what the first matching expression makes.

    Args:
        key_mapping: replacements by expression, of keys without `prefix`, as PEFT has them.

    Raises:
        InputError: two keys become one.
    """
    found: dict[str, Value] = {}
    for key, tensor in tensors.items():
        plain = key.removeprefix(prefix)
        for expression, replacement in (key_mapping or {}).items():
            changed, count = re.subn(expression, replacement, plain)
            if count:
                key = key[: len(key) - len(plain)] + changed
                break
        if key in found:
            raise InputError(f"key_mapping gives two tensors the key {key}")
        found[key] = tensor
    return found
