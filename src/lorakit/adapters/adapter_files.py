"""An adapter's folder, read and checked, and the base model that it is for; no model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.adapters.derived import base_of
from lorakit.adapters.layout_names import refuse_own_names
from lorakit.adapters.manifest import Derivation, Manifest, read_record
from lorakit.errors import InputError
from lorakit.lora.checkpoint import read_adapter
from lorakit.lora.config import LoraConfig
from lorakit.models.forms import CLASSIFICATION, FORMS


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's folder holds; `tensors` are under PEFT's keys.

    `base_model` is the base's name or path, `record` what lorakit knows of how it was made.
    `task_type` is one of `models.forms.FORMS`; `labels` are a classifier's classes.
    """

    folder: Path
    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    base_model: str
    record: Manifest | Derivation | None
    task_type: str
    labels: tuple[str, ...]

    @property
    def manifest(self) -> Manifest | None:
        """The record of its training run; None when lorakit did not train it."""
        return self.record if isinstance(self.record, Manifest) else None


def read_files(folder: str | Path, base: str | None = None) -> AdapterFiles:
    """Reads the adapter in `folder`, and no model.

    Args:
        base: the base model to use in place of the recorded one.

    Raises:
        InputError: there is no usable adapter, or it does not say its base.
    """
    config, tensors = read_adapter(folder)
    refuse_own_names(folder, tensors)
    record = read_record(folder)
    name = base_of(folder, config, base)
    task_type = config.task_type if config.task_type in FORMS else "CAUSAL_LM"
    labels: tuple[str, ...] = ()
    if task_type in CLASSIFICATION:
        labels = _labels(record, tensors, folder)
    return AdapterFiles(Path(folder), config, tensors, name, record, str(task_type), labels)


def _labels(
    record: Manifest | Derivation | None, tensors: Mapping[str, torch.Tensor], folder: str | Path
) -> tuple[str, ...]:
    """A classifier's labels by number: the record's, or as many as its head has outputs."""
    if record and record.labels:
        try:
            names = record.labels["id2label"]
            return tuple(str(names[str(i)]) for i in range(len(names)))
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder}: its record does not number its labels from 0") from error
    outputs = [
        tensor.shape[0]
        for key, tensor in tensors.items()
        if re.search(r"\.(classifier|score|out_proj)\.weight$", key) and "lora_" not in key
    ]
    if len(set(outputs)) != 1:
        raise InputError(f"{folder} does not say which labels its classifier has")
    return tuple(f"LABEL_{i}" for i in range(outputs[0]))  # transformers' own names
