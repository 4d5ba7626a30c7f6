"""What is served with vLLM and where, and the options that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.errors import InputError, listed
from lorakit.server.access import check_key, require_key

DTYPES = ("auto", "bfloat16", "float16")


@dataclass(frozen=True)
class VllmOptions:
    """What is served, and where: the options of `lorakit serve` that vLLM has too.

    `adapters` are folders by the names that clients give as `model`. `model` is the base, by
    default the one that the adapters record. `adapter_root` and `admin_key` together allow
    loading adapters later. `workspace` is where copies of adapters are written, by default in
    lorakit's cache. `context_length` counts tokens, prompt and answer together.
    """

    model: str | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    admin_key: str | None = None
    adapter_root: Path | None = None
    context_length: int | None = None
    dtype: str | None = None
    workspace: Path | None = None


def require_sound(options: VllmOptions) -> None:
    """Raises InputError for options that cannot be meant."""
    if options.model is None and not options.adapters:
        raise InputError("there is nothing to serve: give adapters, or --model")
    if "" in options.adapters:
        raise InputError("an adapter needs a name: NAME=PATH")
    if not options.host or options.host.startswith("-"):
        raise InputError(f"--host {options.host!r} is no address")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise InputError(
            f"vLLM computes adapters in {listed(DTYPES[1:])}, not in {options.dtype}: leave "
            "--dtype out, or serve with --engine lorakit"
        )
    check_key("--api-key", options.api_key)
    check_key("--admin-key", options.admin_key)
    require_key(options.host, options.api_key)
    if (options.adapter_root is None) != (options.admin_key is None):
        raise InputError("loading adapters later needs both --adapter-root and --admin-key")
    if options.adapter_root is not None and options.api_key is None:
        raise InputError(
            "vLLM has one key, which guards loading adapters too: give --api-key beside "
            "--adapter-root"
        )
