"""An original folder written in transformers' layout, one tensor after the other."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import atomic
from lorakit.errors import InputError
from lorakit.folder_lock import reserves
from lorakit.models.layouts.chatglm.config import is_original, native_config, read_original
from lorakit.models.layouts.chatglm.tokenizer import generation_settings, original_tokenizer
from lorakit.models.layouts.chatglm.weights import native_rows, usual_code
from lorakit.models.shards import WEIGHTS_NAME, NewTensor, new_shard, write_index
from lorakit.progress import track

if TYPE_CHECKING:
    from lorakit.models.layouts.chatglm.config import Original
    from lorakit.models.layouts.chatglm.weights import Rows

_KEPT = ("LICENSE", "NOTICE", "MODEL_LICENSE")


@dataclass(frozen=True)
class Converted:
    """What was written: which model, how many tensors and parameters, and their usual dtype."""

    output: str
    generation: str
    tensors: int
    parameters: int
    dtype: str


@reserves("output")
def convert(source: Path, output: str | Path) -> Converted:
    """Writes the original folder `source` to the new folder `output`, for plain transformers.

    Every value keeps its dtype; memory is about the largest tensor's.

    Raises:
        InputError: the source is damaged or no such folder, or `output` exists.
        LorakitError: the disk is full.
    """
    if not is_original(source):
        raise InputError(
            f"{source} is no model in ChatGLM's original layout (model_type chatglm): transformers "
            "reads it as it is"
        )
    original = read_original(source)
    with atomic.new_folder(output) as folder:
        write_companions(original, folder)
        with native_rows(original) as files:
            names = _file_names(len(files))
            shards = {n: _ordered(t) for n, t in zip(names, files.values(), strict=True)}
            every = {name: rows for tensors in shards.values() for name, rows in tensors.items()}
            for name, tensors in track(shards.items(), "converting files"):
                _write(folder / name, tensors)
            if len(shards) > 1:
                write_index(
                    folder,
                    {f: {n: r.tensor for n, r in t.items()} for f, t in shards.items()},
                )
            dtype = NewTensor(usual_code(every), ()).dtype
        config = native_config(original, dtype=dtype, architectures=["GlmForCausalLM"])
        config.save_pretrained(folder)
    return Converted(
        str(output),
        original.generation.value,
        len(every),
        sum(math.prod(rows.tensor.shape) for rows in every.values()),
        str(dtype).removeprefix("torch."),
    )


def write_companions(original: Original, folder: Path) -> None:
    """Writes what goes with the weights: tokenizer, generation settings, and licences.

    Raises:
        InputError: the tokenizer is missing or damaged.
    """
    original_tokenizer(original).save_pretrained(folder)
    generation_settings(original).save_pretrained(folder)
    for path in sorted(original.path.iterdir()):
        if path.name.startswith(_KEPT) and path.is_file():
            shutil.copyfile(path, folder / path.name)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_NAME]
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    return [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _ordered(tensors: dict[str, Rows]) -> dict[str, Rows]:
    """Wide values first, so that each tensor begins at a multiple of its own values' size."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].tensor.dtype.itemsize))


def _write(path: Path, tensors: dict[str, Rows]) -> None:
    with new_shard(path, {name: rows.tensor for name, rows in tensors.items()}) as shard:
        for name, rows in tensors.items():
            shard.write(name, rows[...])
