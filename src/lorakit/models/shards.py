"""A model's weights as files: one safetensors file, or several with an index.

They are read and written a piece at a time, so that memory does not grow with the model. The
format is a length, a JSON header and the tensors' bytes, one after the other
(https://github.com/huggingface/safetensors#format). Files are read, not mapped: pages of a mapped
file count as the process' memory. What the tensors mean is left to others.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
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
}
_CODES = {name: code for code, name in _DTYPES.items()}


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is going to be written: its dtype in the format's words, and its shape."""

    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """torch's dtype.

        Raises:
            InputError: it has none.
        """
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
    """The names of the tensors in each of a model's files, by the file's name.

    Raises:
        InputError: the model has no such files, or its index cannot be right.
    """
    if (folder / WEIGHTS_NAME).is_file():
        return {WEIGHTS_NAME: []}
    index = folder / INDEX_NAME
    if not index.is_file():
        raise InputError(
            f"model: {folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}: save the model with "
            "safetensors, the only files that are read"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in weight_map.items()]
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is damaged: it has no readable weight_map") from error
    shards: dict[str, list[str]] = {}
    for name, file in pairs:
        if PurePath(file).name != file or file in ("", ".", ".."):
            raise InputError(f"{index}: {name} is said to be in {file!r}, outside the folder")
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


def all_tensors(shards: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of all files by name."""
    return {name: tensor for shard in shards.values() for name, tensor in shard.items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        broken = path.is_symlink()
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
    """Open files of a model, from which tensors are read in pieces."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}
        self._opened = ExitStack()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, tensor: StoredTensor, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or rows of it, in a memory of its own.

        Raises:
            InputError: the file cannot be read.
        """
        import torch

        shape = tensor.shape
        begin, end = tensor.begin, tensor.end
        if rows is not None:
            width = (end - begin) // shape[0]
            begin, end = begin + rows.start * width, begin + rows.stop * width
            shape = (rows.stop - rows.start, *shape[1:])
        values = torch.empty(shape, dtype=tensor.dtype)
        if end > begin:
            self._fill(tensor.path, begin, values.view(-1).view(torch.uint8).numpy())
        return values

    def _fill(self, path: Path, begin: int, buffer: Any) -> None:
        try:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = self._opened.enter_context(path.open("rb", buffering=0))
            file.seek(begin)
            view, got = memoryview(buffer), 0
            while got < len(view):
                if not (count := file.readinto(view[got:])):  # type: ignore[attr-defined]
                    raise OSError("the file ends too early")
                got += count
        except OSError as error:
            raise InputError(f"model: {path} cannot be read: {error}") from error


class ShardWriter:
    """One safetensors file that is written tensor by tensor, in the order of its header."""

    def __init__(self, file: BinaryIO, tensors: Mapping[str, NewTensor]) -> None:
        assert sys.byteorder == "little", "safetensors files are little-endian"
        self._file = file
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        self._ends: dict[str, int] = {}
        for name, tensor in tensors.items():
            end = offset + tensor.size
            header[name] = {
                "dtype": tensor.code,
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            self._ends[name] = offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._start = self._file.tell()

    def write(self, values: torch.Tensor) -> None:
        """Appends values of the tensor that is next in the header."""
        import torch

        rest = values.contiguous().view(-1).view(torch.uint8).numpy().data
        while len(rest):
            rest = rest[self._file.write(rest) :]

    def finish(self, name: str) -> None:
        """Checks that exactly the tensor `name` has been written up to here."""
        written = self._file.tell() - self._start
        assert written == self._ends[name], f"{name}: {written} bytes, not {self._ends[name]}"


@contextmanager
def new_shard(path: Path, tensors: Mapping[str, NewTensor]) -> Iterator[ShardWriter]:
    """A new file for these tensors, in this order; wider dtypes must come first."""
    with path.open("wb", buffering=0) as file:
        yield ShardWriter(file, tensors)


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
