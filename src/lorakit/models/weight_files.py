"""A base model without its weights in memory: its modules on the meta device, and its files.

A tensor is read from its file when it is asked for, one at a time, so that models larger than the
memory can be looked at. Loading a model to compute with it is `load.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from lorakit.errors import InputError, listed
from lorakit.models.load import CLASSIFICATION, FORMS
from lorakit.models.names import resolve

if TYPE_CHECKING:
    from torch import nn

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFiles(Mapping[str, torch.Tensor]):
    """The tensors of a model's safetensors files by name, each read when it is asked for."""

    def __init__(self, name: str) -> None:
        """Opens the files of the model `name` (see `lorakit.models.names.resolve`).

        Raises:
            InputError: it has no safetensors files, one is missing or damaged, or the index names
                what is not there.
        """
        source = resolve(name)
        if source.is_gguf:
            raise InputError(
                f"model: {name} is a GGUF file, whose tensors are packed: give a folder with "
                "safetensors"
            )
        self.name, self.folder = name, source.path
        self._files: dict[str, Any] = {}
        self._where = {key: file for file in self._shards() for key in self._open(file).keys()}  # noqa: SIM118
        if (index := self._index()) and (lost := index.keys() - self._where.keys()):
            raise InputError(
                f"{self.folder / _INDEX} names {listed(sorted(lost), 3)}, which no file has"
            )

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._files[self._where[key]].get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, from its file's header."""
        return tuple(self._files[self._where[key]].get_slice(key).get_shape())

    def _index(self) -> dict[str, str]:
        path = self.folder / _INDEX
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            assert all(Path(file).name == file for file in found.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise InputError(f"{path} is damaged: it does not map names to files here") from error
        return found

    def _shards(self) -> list[str]:
        shards = sorted(set(self._index().values())) or [_SINGLE]
        for shard in shards:
            if not (self.folder / shard).is_file():
                raise InputError(f"model: {self.name} has no {shard}, a file with its weights")
        return shards

    def _open(self, file: str) -> Any:
        try:
            self._files[file] = safe_open(self.folder / file, "pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.folder / file} is damaged or cut off: {error}") from error
        return self._files[file]


def blank_model(name: str, task_type: str | None = None, labels: int = 0) -> nn.Module:
    """The model `name` on the meta device: modules and shapes, no values.

    Args:
        task_type: PEFT's word, which decides the form; None or an unknown one is a causal
            language model.
        labels: how many outputs a classifier has; 0 leaves what its configuration says.

    Raises:
        InputError: the name leads nowhere, or there is no such form of the model.
    """
    import transformers

    source = resolve(name)
    form = FORMS.get(task_type or "", FORMS["CAUSAL_LM"])
    where: dict[str, Any] = {"local_files_only": True}
    folder = source.path
    if source.is_gguf:
        folder, where = source.path.parent, {**where, "gguf_file": source.path.name}
    if labels and task_type in CLASSIFICATION:
        where["num_labels"] = labels
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **where)
        with torch.device("meta"):
            model = getattr(transformers, form).from_config(config)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "no reason"
        raise InputError(f"model: {name} has no form as {form}: {reason}") from error
    model.tie_weights()
    return model


def file_keys(model: nn.Module, files: WeightFiles) -> dict[str, str]:
    """The key in the files of every parameter of the blank `model` that they have, by its name.

    Files of a body alone (BERT) lack its place in the whole model (`bert.`), and the other way
    round.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for name, _ in model.named_parameters():
        for key in (name, name.removeprefix(prefix), prefix + name):
            if key in files:
                found[name] = key
                break
    return found
