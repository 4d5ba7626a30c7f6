"""A model's weights as files: one safetensors file, or several with an index.

They are read and written a piece at a time, so that memory does not grow with the model. The
format is a length, a JSON header and the tensors' bytes, one after the other
(https://github.com/huggingface/safetensors#format). Files are read, not mapped: pages of a mapped
file count as the process' memory. What the tensors mean is left to others.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

from lorakit.errors import InputError, listed

if TYPE_CHECKING:
    import torch

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
_CODES = {name: code for code, name in _DTYPES.items()}
_AT_ONCE = 1 << 29  # bytes of a file that are sent to the disk together


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is going to be written: its dtype in the format's words, and its shape."""

    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype."""
        import torch

        if (name := _DTYPES.get(self.code)) is None:
            raise InputError(f"lorakit cannot read or write the dtype {self.code} of safetensors")
        return getattr(torch, name)

    @property
    def size(self) -> int:
        """How many bytes it takes in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor(NewTensor):
    """A tensor in the file `path`, whose bytes lie from `begin` to `end`."""

    path: Path
    begin: int
    end: int


def code_of(dtype: torch.dtype) -> str:
    """The format's word for a dtype."""
    return _CODES[str(dtype).removeprefix("torch.")]


def find_shards(folder: Path) -> dict[str, list[str]]:
    """The names of the tensors in each of a model's files, by the file's name."""
    if (folder / WEIGHTS_NAME).is_file():
        return {WEIGHTS_NAME: []}
    index = folder / INDEX_NAME
    if not index.is_file():
        raise InputError(
            f"model: {folder} has no {WEIGHTS_NAME}: a folder that holds neither {WEIGHTS_NAME} "
            f"nor {INDEX_NAME} cannot be used, as only safetensors is read: save the model with it"
        )
    return read_index(index)


def read_index(index: Path) -> dict[str, list[str]]:
    """The names of the tensors in each of the files that `index` names, by the file's name."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is damaged: it has no readable weight_map") from error
    shards: dict[str, list[str]] = {}
    for name, file in pairs:
        if PurePath(file).name != file or file in ("", ".", ".."):
            raise InputError(f"{index}: {name} is listed in {file!r}, outside the folder")
        shards.setdefault(file, []).append(name)
    if not shards:
        raise InputError(f"{index} names no tensor")
    return dict(sorted(shards.items()))


def read_shards(folder: Path) -> dict[str, dict[str, StoredTensor]]:
    """Every tensor of the model in `folder`, by file and name; each file's header is checked.

    Raises:
        InputError: a file is missing or damaged, or the index and the files disagree.
    """
    found: dict[str, dict[str, StoredTensor]] = {}
    for file, expected in find_shards(folder).items():
        path = folder / file
        tensors = _read_header(path)
        if expected:
            for what, names in (
                ("has no", set(expected) - set(tensors)),
                ("has, and the index does not name,", set(tensors) - set(expected)),
            ):
                if names:
                    raise InputError(
                        f"{folder / INDEX_NAME} does not fit its files: {file} {what} "
                        f"{listed(sorted(names), 3)}"
                    )
        found[file] = tensors
    return found


def usual_dtype(tensors: Iterable[NewTensor]) -> torch.dtype | None:
    """The dtype of the most bytes; None without tensors."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.size
    return sizes.most_common(1)[0][0] if sizes else None


def all_tensors(shards: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of all files by name."""
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        there, broken = path.is_file(), path.is_symlink()
    except (OSError, ValueError):  # no name that a file could have
        there = broken = False
    if not there:
        why = "is a link that leads nowhere, or in a circle" if broken else "is missing"
        raise InputError(f"model: {path} {why}: copy or fetch the model again")
    try:
        with safe_open(path, "pt"):  # checks lengths, offsets and shapes against each other
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"model: {path} is damaged or cut off ({error}): copy or fetch it again"
        ) from error
    start = 8 + length
    return {
        name: StoredTensor(
            entry["dtype"],
            tuple(entry["shape"]),
            path,
            *(start + offset for offset in entry["data_offsets"]),
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


class ShardReader:
    """Open files of a model, from which several threads may read tensors in pieces."""

    def __init__(self, paths: Iterable[Path]) -> None:
        with ExitStack() as opened:
            self._files: dict[Path, BinaryIO] = {
                path: opened.enter_context(path.open("rb", buffering=0)) for path in set(paths)
            }
            self._opened = opened.pop_all()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, tensor: StoredTensor, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or rows of it, in a memory of its own."""
        import torch

        shape, begin = tensor.shape, tensor.begin
        if rows is not None:
            begin += rows.start * ((tensor.end - tensor.begin) // shape[0])
            shape = (rows.stop - rows.start, *shape[1:])
        values = torch.empty(shape, dtype=tensor.dtype)
        rest = values.view(-1).view(torch.uint8).numpy().data
        try:
            handle = self._files[tensor.path].fileno()
            while len(rest):
                if not (count := os.preadv(handle, [rest], begin)):
                    raise OSError("it ends too early")
                rest, begin = rest[count:], begin + count
        except OSError as error:
            raise InputError(f"model: {tensor.path} cannot be read: {error}") from error
        return values


class ShardWriter:
    """One safetensors file that is written piece by piece, in the order of its header."""

    def __init__(self, file: BinaryIO, tensors: Mapping[str, NewTensor]) -> None:
        assert sys.byteorder == "little", "safetensors files are little-endian"
        self._file = file
        self._ends: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            begin, end = end, end + tensor.size
            shape = list(tensor.shape)
            header[name] = {"dtype": tensor.code, "shape": shape, "data_offsets": [begin, end]}
            self._ends[name] = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._written, self._size, self._sent = 0, end, 0

    def write(self, name: str, values: torch.Tensor) -> None:
        """Appends values of the tensor `name`, whose turn it must be."""
        import torch

        rest = values.contiguous().view(-1).view(torch.uint8).numpy().data
        self._written += len(rest)
        assert self._written <= self._ends[name], f"{name} is longer than its header says"
        while len(rest):
            rest = rest[self._file.write(rest) :]
        if self._written - self._sent >= _AT_ONCE:
            self._send()

    def _send(self) -> None:
        """Has what was written put on the disk now, while more is computed, and its pages reused.

        Left alone, the system begins when much of the memory holds it, and every page is a new one.
        """
        if hasattr(os, "posix_fadvise"):
            begin, size = self._sent, self._written - self._sent
            os.posix_fadvise(self._file.fileno(), begin, size, os.POSIX_FADV_DONTNEED)
        self._sent = self._written

    def close(self) -> None:
        """Checks that all has been written."""
        assert self._written == self._size, f"{self._written} bytes, not {self._size}"


@contextmanager
def new_shard(path: Path, tensors: Mapping[str, NewTensor]) -> Iterator[ShardWriter]:
    """A new file for these tensors, in this order; wider dtypes must come first."""
    with path.open("wb", buffering=0) as file:
        writer = ShardWriter(file, tensors)
        yield writer
        writer.close()


def write_index(folder: Path, shards: Mapping[str, Mapping[str, NewTensor]]) -> None:
    """Writes the index of a model that has several files."""
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
            "total_size": sum(tensor.size for tensor in tensors.values()),
        },
        "weight_map": {name: file for file, shard in shards.items() for name in sorted(shard)},
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
