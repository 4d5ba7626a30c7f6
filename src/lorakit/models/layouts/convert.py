"""A model in a foreign layout written in transformers' own, one tensor after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import transformers

from lorakit import atomic
from lorakit.errors import InputError
from lorakit.folder_lock import reserves
from lorakit.models.layouts import LAYOUTS, layout_of
from lorakit.models.layouts.layout import ForeignLayout, TensorSource
from lorakit.models.shards import WEIGHTS_NAME, new_shard, usual_dtype, write_index
from lorakit.progress import track


@dataclass(frozen=True)
class Converted:
    """What was written: which model, how many tensors and parameters, and their usual dtype."""

    output: str
    kind: str
    tensors: int
    parameters: int
    dtype: str


@reserves("output")
def convert(source: Path, output: str | Path) -> Converted:
    """Writes the model in the foreign folder `source` to `output`, for plain transformers.

    Every value keeps its dtype; memory is about the largest tensor's.

    Raises:
        InputError: the source is damaged or no such folder, or `output` exists.
        LorakitError: the disk is full.
    """
    layout = layout_of(source)
    if not isinstance(layout, ForeignLayout):
        known = [kind.title for kind in LAYOUTS if issubclass(kind, ForeignLayout)]
        raise InputError(
            f"{source} is not in {' or '.join(known)}: there is nothing to convert, as "
            "transformers reads it as it is"
        )
    config = layout.config()
    with atomic.new_folder(output) as folder:
        layout.write_companions(folder)
        with layout.sources() as files:
            names = _file_names(len(files))
            shards = {n: _ordered(t) for n, t in zip(names, files.values(), strict=True)}
            written = {f: {n: one.tensor for n, one in t.items()} for f, t in shards.items()}
            for name, tensors in track(shards.items(), "converting files"):
                with new_shard(folder / name, written[name]) as shard:
                    for key, one in tensors.items():
                        shard.write(key, one[...])
            if len(shards) > 1:
                write_index(folder, written)
            every = [one for tensors in written.values() for one in tensors.values()]
            dtype = usual_dtype(every)
        form = transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__
        layout.config(dtype=dtype, architectures=[form]).save_pretrained(folder)
    return Converted(
        str(output),
        layout.kind,
        len(every),
        sum(math.prod(one.shape) for one in every),
        str(dtype).removeprefix("torch."),
    )


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS_NAME]
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    return [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


def _ordered(tensors: dict[str, TensorSource]) -> dict[str, TensorSource]:
    """Wide values first, so that each tensor begins at a multiple of its own values' size."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].tensor.dtype.itemsize))
