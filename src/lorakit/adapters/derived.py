"""An adapter made out of others or out of models, without training: its ranks, folder and record.

Its `lorakit.json` says what it was made of, and never pretends to be a training run's. What is in
the updates is the verbs' own (`combine.py`, `resize.py`, `extract.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit import atomic
from lorakit.adapters.adapter_tokenizer import common_tokenizer, copy_tokenizer
from lorakit.adapters.chat_template import common_template
from lorakit.adapters.manifest import Derivation, SourceRecord, read_record, write_manifest
from lorakit.errors import BASE_OPTION, InputError
from lorakit.lora.checkpoint import weights_file, write_adapter
from lorakit.lora.combination import Combined
from lorakit.lora.config import LoraConfig
from lorakit.models.template_files import Templates, write_templates


@dataclass(frozen=True)
class Origin:
    """What an adapter's folder says of its base; None where it does not."""

    base_model: str | None
    base_fingerprint: str | None
    labels: dict[str, Any] | None


def origin(folder: str | Path, config: LoraConfig) -> Origin:
    """What is known of the base of the adapter in `folder`, whoever made it."""
    record = read_record(folder)
    if record is None:
        return Origin(config.base_model_name_or_path, None, None)
    name = record.base_model or config.base_model_name_or_path
    return Origin(name, record.base_fingerprint, record.labels)


def base_of(folder: str | Path, config: LoraConfig, base: str | None) -> str:
    """The name of the base model of the adapter in `folder`: `base`, or the recorded one."""
    if not (name := base or origin(folder, config).base_model):
        raise InputError(f"{folder} does not say which base model it is for: give {BASE_OPTION}")
    return name


def other_weights(adapter: str | Path, base: str) -> str:
    """The notice for an adapter whose base had another fingerprint than `base` has."""
    return (
        f"{adapter} was trained on other weights than those of {base}: its answers may be worse "
        "than when it was trained"
    )


@dataclass(frozen=True)
class KindRanks:
    """The modules of one kind (`q_proj`) after a truncation.

    `lost` is the share of ‖ΔW‖², over these modules, that was cut off; `error` its root,
    ‖ΔW - ΔW'‖ / ‖ΔW‖.
    """

    kind: str
    modules: int
    ranks: tuple[int, int]
    lost: float

    @property
    def error(self) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖ over these modules."""
        return math.sqrt(self.lost)


class Truncations:
    """Ranks by module's path, and of each module ‖ΔW‖² and what of it was cut off."""

    def __init__(self) -> None:
        self.ranks: dict[str, int] = {}
        self._energies: dict[str, tuple[float, float]] = {}

    def add(self, path: str, found: Combined) -> None:
        """Notes what became of a module's update."""
        self.ranks[path], self._energies[path] = found.A.shape[0], (found.energy, found.lost)

    @property
    def lost(self) -> float:
        """The share of ‖ΔW‖², over all modules, that was cut off."""
        return _share(self._energies.values())

    @property
    def error(self) -> float:
        """‖ΔW - ΔW'‖ / ‖ΔW‖ over all modules."""
        return math.sqrt(self.lost)

    def retained(self) -> dict[str, float]:
        """The share of ‖ΔW‖² that each module keeps, by path."""
        return {path: 1 - _share([one]) for path, one in self._energies.items()}

    def kinds(self) -> list[KindRanks]:
        """Ranks and losses by the last part of the modules' paths."""
        groups: dict[str, list[str]] = {}
        for path in self.ranks:
            groups.setdefault(path.rpartition(".")[2], []).append(path)
        found = []
        for kind, paths in groups.items():
            own = [self.ranks[path] for path in paths]
            lost = _share([self._energies[path] for path in paths])
            found.append(KindRanks(kind, len(paths), (min(own), max(own)), lost))
        return found


def _share(energies: Collection[tuple[float, float]]) -> float:
    total, lost = (math.fsum(column) for column in zip(*energies, strict=True))
    return max(0.0, lost / total) if total else 0.0


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_joined(
    output: str | Path,
    folders: Sequence[Path],
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    derivation: Derivation,
) -> None:
    """As `write_derived`, with chat template and tokenizer of the adapters in `folders`."""
    derivation.sources = [
        SourceRecord(path=str(one), sha256=sha256(weights_file(one))) for one in folders
    ]
    templates, derivation.template_sha256 = common_template(folders, derivation.notices)
    tokenizer = common_tokenizer(folders, derivation.notices)
    write_derived(output, config, tensors, derivation, templates, tokenizer)


def write_derived(
    output: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    derivation: Derivation,
    templates: Templates | None,
    tokenizer: Path | None,
) -> None:
    """Writes the adapter and its record into the new folder `output`, in one step.

    Args:
        templates: the chat templates that it is asked with, if it has its own.
        tokenizer: a folder whose tokenizer goes along, as it has tokens that the base's has not.
    """
    with atomic.new_folder(output) as folder:
        write_adapter(folder, config, tensors)
        write_manifest(folder, derivation)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        if templates is not None:
            write_templates(folder, templates)
