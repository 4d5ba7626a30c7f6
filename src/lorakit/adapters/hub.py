"""An adapter's folder to the Hugging Face hub, and from there, only when asked.

What goes up is a short list of known files. Checkpoints, samples, logs and optimizer states stay,
and so does `lorakit.json`, which names the data's paths, unless it is asked for.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lorakit import atomic
from lorakit.adapters.adapter_tokenizer import TOKENIZER_FILES
from lorakit.adapters.lineage import require_complete
from lorakit.adapters.manifest import MANIFEST_NAME, read_manifest
from lorakit.errors import InputError, LorakitError, first_line
from lorakit.folder_lock import reserves
from lorakit.lora.checkpoint import read_adapter, write_adapter
from lorakit.lora.locate import CONFIG_NAME, INITIAL_NAME, PICKLED_NAME, WEIGHTS_NAME
from lorakit.models.names import ALIASES
from lorakit.models.template_files import ADDITIONAL, TEMPLATE_NAME

FILES = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    INITIAL_NAME,
    "README.md",
    TEMPLATE_NAME,
    *TOKENIZER_FILES,
    "LICENSE",
)
"""What of an adapter's folder is uploaded, and fetched."""


@dataclass(frozen=True)
class Selection:
    """What of a folder goes up (names and bytes), what stays, and what should be known of it."""

    files: dict[str, int]
    left_out: tuple[str, ...]
    notices: tuple[str, ...]


def selection(adapter: str | Path, with_record: bool = False) -> Selection:
    """What `push` uploads of the folder `adapter`.

    Args:
        with_record: `lorakit.json` too.

    Raises:
        InputError: the folder holds no whole adapter.
    """
    folder = Path(adapter)
    config, tensors = read_adapter(folder)
    require_complete(folder, verb="uploaded")
    if not (folder / WEIGHTS_NAME).is_file():
        raise InputError(
            f"{folder} holds its weights as a pickle, which is not uploaded: write its "
            f"{len(tensors)} tensors with safetensors.torch.save_file as {WEIGHTS_NAME}"
        )
    wanted = [*FILES, *_more_templates(folder), *([MANIFEST_NAME] if with_record else [])]
    files = {name: (folder / name).stat().st_size for name in wanted if (folder / name).is_file()}
    left_out = sorted(
        f"{path.name}/" if path.is_dir() else path.name
        for path in folder.iterdir()
        if path.name not in files and path.name != ADDITIONAL
    )
    notices = []
    if manifest := read_manifest(folder):
        paths = ", ".join(str(part.get("path", part)) for part in manifest.data)
        what = "is uploaded, and" if with_record else "stays here (--with-record uploads it), as it"
        notices.append(f"{MANIFEST_NAME} {what} names the recipe and the data: {paths}")
    base = config.base_model_name_or_path or ""
    if base in ALIASES or Path(base).is_absolute() or Path(base).exists():
        what = "lorakit's alias" if base in ALIASES else "a path of this machine"
        notices.append(
            f"{CONFIG_NAME} names the base model by {what}, {base}: others do not find it by that"
        )
    return Selection(files, tuple(left_out), tuple(notices))


def push(
    adapter: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    with_record: bool = False,
    confirm: Callable[[Selection], bool] = lambda chosen: True,
) -> str | None:
    """Uploads an adapter to the repository `repo` (owner/name), which is made if it is missing.

    Args:
        private: whether a new repository can be seen by its owner only.
        revision: a branch, made if it is missing; None for `main`.
        confirm: is shown what would go up before anything is sent, and says whether to.

    Returns: the commit's address, None when `confirm` said no.

    Raises:
        InputError: there is no adapter, or `repo` is no name.
        LorakitError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    chosen = selection(adapter, with_record)
    _require_name(repo)
    if not confirm(chosen):
        return None
    with _named_failures(f"{repo} was not uploaded"):
        hub = HfApi()
        name = hub.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision:
            hub.create_branch(name, branch=revision, exist_ok=True)
        commit = hub.create_commit(
            name,
            [CommitOperationAdd(file, Path(adapter) / file) for file in chosen.files],
            commit_message="Upload adapter",
            revision=revision,
        )
    return str(commit.commit_url)


@reserves("output")
def pull(repo: str, output: str | Path, *, revision: str | None = None) -> list[str]:
    """Fetches the adapter in the repository `repo` into the new folder `output`.

    Only known files are taken. Weights that are there as a pickle alone are written as safetensors,
    so that no pickle arrives.

    Returns: the names of the files.

    Raises:
        InputError: what is there is no whole adapter, or `output` exists.
        LorakitError: the hub cannot be reached, or does not have it.
    """
    from huggingface_hub import snapshot_download

    _require_name(repo)
    wanted = [*FILES, MANIFEST_NAME, f"{ADDITIONAL}/*.jinja"]
    with _named_failures(f"{repo} was not fetched"):
        source = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        if not (source / WEIGHTS_NAME).is_file():
            old = [*wanted, PICKLED_NAME]
            source = Path(snapshot_download(repo, revision=revision, allow_patterns=old))
    names = [*FILES, MANIFEST_NAME, *_more_templates(source)]
    names = [name for name in names if (source / name).is_file()]
    if CONFIG_NAME not in names:
        raise InputError(f"{repo} holds no adapter: there is no {CONFIG_NAME} in it")
    try:
        config, tensors = read_adapter(source)
    except InputError as error:  # it names a place in the cache, which nobody knows
        raise InputError(str(error).replace(str(source), repo)) from error
    with atomic.new_folder(output) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        if WEIGHTS_NAME not in names:
            write_adapter(folder, config, tensors)
    return names if WEIGHTS_NAME in names else [*names, WEIGHTS_NAME]


def _more_templates(folder: Path) -> list[str]:
    """The files of further chat templates, beside the usual one."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob(f"{ADDITIONAL}/*.jinja"))


def _require_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is not a repository's name (owner/name): {error}") from error
    if "/" not in repo:
        raise InputError(f"{repo!r} is not a repository's name: give owner/name")


@contextmanager
def _named_failures(what: str) -> Iterator[None]:
    """Turns what the hub or the network refuses into one line."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except (LorakitError, KeyboardInterrupt):
        raise
    except Exception as error:  # every kind of network and hub failure means the same here
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = first_line(error)
        if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
            reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the hub does not answer"
        cure = "; log in: hf auth login" if status == 401 else ""
        raise LorakitError(f"{what}: {reason}{cure}") from error
