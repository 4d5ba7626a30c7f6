"""A short fingerprint of a base model's weights, to notice an adapter on the wrong base."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.errors import InputError
from lorakit.models.names import resolve
from lorakit.models.quantization.prepare import quantized_when_loaded
from lorakit.models.shards import ShardReader, StoredTensor, all_tensors
from lorakit.models.skeleton import file_names
from lorakit.weight_formats import dequantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDED = "fingerprint_before_rounding"
"""Under this name a model has its fingerprint whose weights were rounded in memory."""

_SAMPLED = 64  # values of each tensor: milliseconds for any model, and no two models agree


def fingerprint(model: nn.Module, without: Sequence[str] = ()) -> str | None:
    """SHA-256 over every parameter's name, shape, and first values rounded to bfloat16.

    The rounding makes it the same for a model loaded in bfloat16 and in float32, and float16 is
    read anew from the model's files. Take it before adapters are put on. A model that is quantised
    while it is loaded has the one of its files; None where these do not hold every parameter as it
    is.

    Args:
        without: paths of modules that are not of the base: a new head.
    """
    if (known := vars(model).get(ROUNDED)) is not None:
        return str(known)
    if quantized_when_loaded(model):
        return _of_its_files(model, without)
    parameters = {n: one for n, one in model.named_parameters() if not _under(n, without)}
    values = {name: _first_numbers(one) for name, one in parameters.items()}
    if any(one.dtype == torch.float16 for one in values.values()):
        values |= _unrounded(model, values)
    return _digest({name: tuple(one.shape) for name, one in parameters.items()}, values)


def _first_numbers(parameter: torch.Tensor) -> torch.Tensor:
    # Packed integers are taken as they are stored.
    plain = dequantized(parameter) if parameter.is_floating_point() else parameter
    return plain.detach().flatten()[:_SAMPLED]


def _unrounded(model: Any, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model's files hold of those of `values` that are theirs, rounded to float16.

    float16 has less room for small and large numbers than bfloat16, so that these cannot be told
    from its values. Nothing where there are no files that can be read tensor by tensor.
    """
    found: dict[str, torch.Tensor] = {}
    with suppress(InputError):
        tensors = all_tensors(resolve(model.config._name_or_path).layout.shards())
        stored = {k: tensors[v] for k, v in file_names(model, tensors).stored.items()}
        with ShardReader(tensor.path for tensor in stored.values()) as reader:
            for name in values.keys() & stored.keys():
                first = _first_of_file(stored[name], reader)
                if torch.equal(first.to(torch.float16), values[name].cpu()):
                    found[name] = first
    return found


def _of_its_files(model: Any, without: Sequence[str]) -> str | None:
    source = resolve(model.config._name_or_path)
    if source.layout.packing:
        return None
    return fingerprint_of_skeleton(model, all_tensors(source.layout.shards()), without=without)


def fingerprint_of_files(tensors: Mapping[str, StoredTensor], reader: ShardReader) -> str:
    """The same of a model that is not loaded: of `tensors` by the model's names for them."""
    values = {name: _first_of_file(tensor, reader) for name, tensor in tensors.items()}
    return _digest({name: tensor.shape for name, tensor in tensors.items()}, values)


def _first_of_file(tensor: StoredTensor, reader: ShardReader) -> torch.Tensor:
    rows = None
    if tensor.shape:
        width = max(1, math.prod(tensor.shape[1:]))
        rows = slice(0, min(-(-_SAMPLED // width), tensor.shape[0]))
    return reader.read(tensor, rows).flatten()[:_SAMPLED]


def fingerprint_of_skeleton(
    model: PreTrainedModel,
    tensors: Mapping[str, StoredTensor],
    partly: bool = False,
    without: Sequence[str] = (),
) -> str | None:
    """The same of a model without weights; None where its files do not hold every parameter as is.

    Args:
        tensors: all that the files hold, by their names there.
        partly: parameters that are not in the files are left out.
    """
    stored = file_names(model, tensors).stored
    names = [name for name, _ in model.named_parameters() if not _under(name, without)]
    there = {name: tensors[stored[name]] for name in names if name in stored}
    if len(there) < len(names) and not partly:
        return None
    with ShardReader(tensor.path for tensor in there.values()) as reader:
        return fingerprint_of_files(there, reader)


def _under(name: str, paths: Sequence[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _digest(shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, first in sorted(values.items()):
        digest.update(f"{name}{shapes[name]}".encode())
        rounded = first.to("cpu", torch.bfloat16)
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
