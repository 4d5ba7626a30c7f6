"""An adapter made out of others or out of models, without training: its folder and its record.

Its `lorakit.json` says what it was made of, and never pretends to be a training run's: that is
`manifest.py`'s. What the verbs put into the folder is their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from lorakit import atomic
from lorakit.adapters.adapter_tokenizer import copy_tokenizer
from lorakit.adapters.manifest import MANIFEST_NAME, read_manifest, read_record
from lorakit.lora.checkpoint import weights_file, write_adapter
from lorakit.models.template_files import Templates, write_templates
from lorakit.version import __version__

if TYPE_CHECKING:
    import torch

    from lorakit.lora.config import LoraConfig


class SourceRecord(BaseModel):
    """What an adapter was made of: where it lay, and the SHA-256 of its weights' file or files."""

    path: str
    sha256: str | None = None


class Derivation(BaseModel):
    """How an adapter came about that no run trained.

    `options` are the verb's, `figures` what it measured; `base_fingerprint`, `labels` and
    `template_sha256` are the sources', where these know them.
    """

    model_config = ConfigDict(extra="allow")

    made_by: Literal["combine", "resize", "extract"]
    sources: list[SourceRecord]
    options: dict[str, Any] = {}
    figures: dict[str, float] = {}
    notices: list[str] = []
    base_model: str | None = None
    base_fingerprint: str | None = None
    template_sha256: str | None = None
    labels: dict[str, Any] | None = None
    versions: dict[str, str] = {"lorakit": __version__}


@dataclass(frozen=True)
class Origin:
    """What an adapter's folder says of its base; None where it does not."""

    base_model: str | None
    base_fingerprint: str | None
    labels: dict[str, Any] | None


def read_derivation(folder: str | Path) -> Derivation | None:
    """The record of an adapter that was made out of others; None for every other adapter.

    Raises:
        InputError: there is one, and it is damaged.
    """
    return read_record(folder, Derivation, made=True, again="make")


def origin(folder: str | Path, config: LoraConfig) -> Origin:
    """What is known of the base of the adapter in `folder`, whoever made it."""
    record = read_manifest(folder) or read_derivation(folder)
    if record is None:
        return Origin(config.base_model_name_or_path, None, None)
    name = record.base_model or config.base_model_name_or_path
    return Origin(name, record.base_fingerprint, record.labels)


def other_weights(adapter: str | Path, base: str) -> str:
    """What is said of an adapter whose base had another fingerprint than `base` has."""
    return (
        f"{adapter} was trained on other weights than those of {base}: its answers may be worse "
        "than when it was trained"
    )


def source(folder: Path) -> SourceRecord:
    """The adapter in `folder` as a source."""
    return SourceRecord(path=str(folder), sha256=sha256(weights_file(folder)))


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_derived(
    output: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    derivation: Derivation,
    templates: Templates | None,
    tokenizer: Path | None = None,
) -> None:
    """Writes the adapter and its record into the new folder `output`, in one step.

    Args:
        templates: the chat templates that it is asked with, if it has its own.
        tokenizer: a folder whose tokenizer goes along, as it has tokens that the base's has not.

    Raises:
        InputError: `output` is taken.
    """
    with atomic.new_folder(output) as folder:
        write_adapter(folder, config, tensors)
        record = json.dumps(derivation.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (folder / MANIFEST_NAME).write_text(record + "\n", encoding="utf-8")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        if templates is not None:
            write_templates(folder, templates)
