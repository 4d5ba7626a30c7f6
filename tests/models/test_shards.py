"""Files that are written piece by piece are safetensors files, and are read piece by piece."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.models.shards import (
    INDEX_NAME,
    WEIGHTS_NAME,
    NewTensor,
    ShardReader,
    all_tensors,
    code_of,
    new_shard,
    read_shards,
    write_index,
)

TENSORS = {
    "double": torch.randn(3, 2, dtype=torch.float64),
    "numbers": torch.arange(5),
    "half": torch.randn(7, 3).bfloat16(),
    "empty": torch.empty(0, 4),
    "one": torch.tensor(2.5),
    "flags": torch.tensor([True, False, True]),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
    "größe": torch.randn(2),
}


def test_every_dtype_and_shape_goes_through_a_file_and_back(tmp_path: Path):
    tensors = dict(sorted(TENSORS.items(), key=lambda item: -item[1].itemsize))
    new = {name: NewTensor(code_of(t.dtype), tuple(t.shape)) for name, t in tensors.items()}
    with new_shard(tmp_path / WEIGHTS_NAME, new) as shard:
        for name, tensor in tensors.items():
            for piece in tensor.split(2) if tensor.dim() and len(tensor) else [tensor]:
                shard.write(name, piece)
    read = load_file(tmp_path / WEIGHTS_NAME)
    stored = all_tensors(read_shards(tmp_path))
    assert read.keys() == stored.keys() == tensors.keys()
    with ShardReader([tmp_path / WEIGHTS_NAME]) as reader:
        for name, tensor in tensors.items():
            own = reader.read(stored[name])
            assert own.dtype == read[name].dtype == tensor.dtype
            assert own.shape == read[name].shape == tensor.shape
            assert own.tolist() == read[name].tolist() == tensor.tolist()
        rows = reader.read(stored["half"], slice(2, 5))
    assert torch.equal(rows, tensors["half"][2:5])


def test_rows_of_several_files_are_found_by_the_index(tmp_path: Path):
    shards = {"a.safetensors": {"x": torch.randn(3)}, "b.safetensors": {"y": torch.randn(2, 2)}}
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    new = {
        file: {name: NewTensor("F32", tuple(t.shape)) for name, t in tensors.items()}
        for file, tensors in shards.items()
    }
    write_index(tmp_path, new)
    assert (tmp_path / INDEX_NAME).is_file()
    stored = all_tensors(read_shards(tmp_path))
    with ShardReader(tensor.path for tensor in stored.values()) as reader:
        assert torch.equal(reader.read(stored["y"]), shards["b.safetensors"]["y"])


def test_a_file_that_is_not_filled_as_its_header_says_is_noticed(tmp_path: Path):
    new = {"x": NewTensor("F32", (4,))}
    with (
        pytest.raises(AssertionError, match="12 bytes, not 16"),
        new_shard(tmp_path / WEIGHTS_NAME, new) as shard,
    ):
        shard.write("x", torch.zeros(3))
    with (
        pytest.raises(AssertionError, match="longer than its header"),
        new_shard(tmp_path / WEIGHTS_NAME, new) as shard,
    ):
        shard.write("x", torch.zeros(5))
