"""The original files' tensors under transformers' names, each read when it is asked for.

Both of the published forms are read: safetensors, and torch's `.bin`, of which nothing but tensors
is ever unpickled. Names, shapes and dtypes are compared with the configuration before any value is
read.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.commands import quoted
from lorakit.errors import InputError, listed
from lorakit.models.layouts.chatglm.config import Original, is_original
from lorakit.models.layouts.chatglm.layout import UNUSED, parts, stored_shapes
from lorakit.models.shards import (
    INDEX_NAME,
    WEIGHTS_NAME,
    NewTensor,
    ShardReader,
    StoredTensor,
    all_tensors,
    code_of,
    read_index,
    read_shards,
)

if TYPE_CHECKING:
    import torch

BIN_NAME = "pytorch_model.bin"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"
_FLOATS = ("F64", "F32", "BF16", "F16")
_FETCH = "copy or fetch the model again"


@dataclass(frozen=True)
class Rows:
    """A native tensor whose values are read, into a memory of their own, by `rows[...]`.

    transformers loads a model out of objects that can do this, as safetensors' own slices can.
    """

    tensor: NewTensor
    read: Callable[[], torch.Tensor]

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self.read()[key]


def has_safetensors(path: Path) -> bool:
    """Whether the weights in the folder are safetensors, which are then the ones that are read."""
    return (path / WEIGHTS_NAME).is_file() or (path / INDEX_NAME).is_file()


def lacks_weights(path: Path) -> bool:
    """Whether the folder is in the original layout, and no file of weights lies there.

    chatglm2-6b has `.bin` files alone, which are fetched where there is nothing else.
    """
    return is_original(path) and not has_safetensors(path) and not any(path.glob("*.bin"))


def native_shards(original: Original) -> dict[str, dict[str, StoredTensor]]:
    """Where every native tensor lies in the original safetensors files, by file and native name.

    Raises:
        InputError: the files do not fit the configuration, are damaged, or are `.bin` files.
    """
    path = original.path
    if not has_safetensors(path):
        _bin_files(path)
        raise InputError(
            f"model: {path} has its weights in {BIN_NAME} files, which cannot be read tensor by "
            "tensor: write them as safetensors with "
            f"lorakit convert {quoted(path)} -o DIR, and give DIR as the base model"
        )
    shards = read_shards(path)
    _check(original, all_tensors(shards))
    found: dict[str, dict[str, StoredTensor]] = {}
    for native, part in parts(original).items():
        file, stored = next((f, t[part.name]) for f, t in shards.items() if part.name in t)
        width = (stored.end - stored.begin) // stored.shape[0]
        begin = stored.begin + part.start * width
        end = begin + part.shape[0] * width
        own = StoredTensor(stored.code, part.shape, stored.path, begin, end)
        found.setdefault(file, {})[native] = own
    return {file: found[file] for file in sorted(found)}


@contextmanager
def native_rows(original: Original) -> Iterator[dict[str, dict[str, Rows]]]:
    """Every native tensor by file and name; within the block its values can be read.

    Raises:
        InputError: the files do not fit the configuration, or are damaged.
    """
    if not has_safetensors(original.path):
        yield _rows_of_bins(original)
        return
    shards = native_shards(original)
    with ShardReader(tensor.path for tensor in all_tensors(shards).values()) as reader:
        yield {
            file: {name: Rows(t, partial(reader.read, t)) for name, t in tensors.items()}
            for file, tensors in shards.items()
        }


def usual_code(tensors: Mapping[str, Rows]) -> str:
    """The dtype of the most values, in safetensors' word."""
    sizes: dict[str, int] = {}
    for rows in tensors.values():
        sizes[rows.tensor.code] = sizes.get(rows.tensor.code, 0) + rows.tensor.size
    return max(sizes, key=lambda code: sizes[code])


def _rows_of_bins(original: Original) -> dict[str, dict[str, Rows]]:
    """As `native_rows`, of mapped files: values come into memory when they are copied."""
    files = {file: _load_bin(original.path / file) for file in _bin_files(original.path)}
    where: dict[str, str] = {}
    for file, tensors in files.items():
        for name in tensors:
            if name in where:
                raise InputError(f"model: {original.path}: {name} is in {where[name]} and {file}")
            where[name] = file
    _check(
        original,
        {
            name: NewTensor(_code(tensor), tuple(tensor.shape))
            for tensors in files.values()
            for name, tensor in tensors.items()
        },
    )
    found: dict[str, dict[str, Rows]] = {}
    for native, part in parts(original).items():
        file = where[part.name]
        values = files[file][part.name][part.start : part.start + part.shape[0]]
        new = NewTensor(_code(values), part.shape)
        found.setdefault(file, {})[native] = Rows(new, partial(_copied, values))
    return {file: found[file] for file in sorted(found)}


def _code(tensor: torch.Tensor) -> str:
    """safetensors' word for the dtype, or torch's where it has none."""
    try:
        return code_of(tensor.dtype)
    except KeyError:
        return str(tensor.dtype)


def _copied(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values.clone(memory_format=torch.contiguous_format)


def _bin_files(path: Path) -> list[str]:
    """The names of the `.bin` files with weights.

    Raises:
        InputError: there are none, or their index cannot be right.
    """
    if (path / BIN_INDEX_NAME).is_file():
        return list(read_index(path / BIN_INDEX_NAME))
    if (path / BIN_NAME).is_file():
        return [BIN_NAME]
    raise InputError(
        f"model: {path} has no weights: there is neither {WEIGHTS_NAME} nor {BIN_NAME}, nor an "
        f"index of several ({INDEX_NAME}): {_FETCH}"
    )


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch's, mapped; anything else in it is refused.

    Raises:
        InputError: it is missing, cut off, or holds more than tensors.
    """
    import torch

    if not path.is_file():
        raise InputError(f"model: {path} is missing: {_FETCH}")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(_more_than_tensors(path)) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        if "mmap can only be used" in str(error):
            raise InputError(
                f"model: {path} is no file of tensors that a torch since 1.6 has written, or is "
                f"cut off: {_FETCH}"
            ) from error
        raise InputError(f"model: {path} is damaged or cut off: {_FETCH}") from error
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and type(value) is torch.Tensor for name, value in values.items()
    ):
        raise InputError(_more_than_tensors(path))
    return values


def _more_than_tensors(path: Path) -> str:
    return (
        f"model: {path} holds other things than tensors, which may run any program when they are "
        "read, and is refused: get the model as safetensors"
    )


def _check(original: Original, tensors: Mapping[str, NewTensor]) -> None:
    """Compares names, shapes and dtypes of the original tensors with the configuration.

    Raises:
        InputError: they differ.
    """
    path, expected = original.path, stored_shapes(original)
    if missing := [name for name in expected if name not in tensors]:
        raise InputError(f"model: {path} lacks {listed(missing, 3)} in its files: {_FETCH}")
    if more := sorted(tensors.keys() - expected.keys() - UNUSED):
        hint = " (a prefix of P-tuning)" if any("prefix_encoder" in name for name in more) else ""
        raise InputError(
            f"model: {path} holds {listed(more, 3)}{hint}, which its configuration has no place "
            "for: give a model whose files and config.json belong together"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise InputError(
                f"model: {name} has the shape {tensor.shape} in {path}, and its config.json needs "
                f"{shape}"
            )
        if tensor.code not in _FLOATS:
            raise InputError(
                f"model: {name} is stored as {tensor.code} in {path}: only plain floating weights "
                "are read: give the model that it was quantised from"
            )
