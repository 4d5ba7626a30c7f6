"""A short fingerprint of a base model's weights, to notice an adapter on the wrong base."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.models.names import resolve
from lorakit.models.quantization.prepare import quantized_when_loaded
from lorakit.models.shards import ShardReader, StoredTensor, all_tensors
from lorakit.models.skeleton import file_names
from lorakit.weight_formats import dequantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAMPLED = 64  # values of each tensor: milliseconds for any model, and no two models agree


def fingerprint(model: nn.Module, without: Sequence[str] = ()) -> str | None:
    """SHA-256 over every parameter's name, shape, and first values rounded to bfloat16.

    The rounding makes it the same for a model loaded in bfloat16 and in float32. Take it before
    adapters are put on. A model that is quantised while it is loaded has the one of its files;
    None where these do not hold every parameter as it is.

    Args:
        without: paths of modules that are not of the base: a new head.
    """
    if quantized_when_loaded(model):
        return _of_its_files(model, without)
    parameters = {n: one for n, one in model.named_parameters() if not _under(n, without)}
    return _digest(
        {name: tuple(one.shape) for name, one in parameters.items()},
        {name: _first_numbers(one) for name, one in parameters.items()},
    )


def _first_numbers(parameter: torch.Tensor) -> torch.Tensor:
    # Packed integers are taken as they are stored.
    plain = dequantized(parameter) if parameter.is_floating_point() else parameter
    return plain.detach().flatten()[:_SAMPLED]


def _of_its_files(model: Any, without: Sequence[str]) -> str | None:
    source = resolve(model.config._name_or_path)
    if source.layout.packing:
        return None
    return fingerprint_of_skeleton(model, all_tensors(source.layout.shards()), without=without)


def fingerprint_of_files(tensors: Mapping[str, StoredTensor], reader: ShardReader) -> str:
    """The same of a model that is not loaded: of `tensors` by the model's names for them."""
    values = {}
    for name, tensor in tensors.items():
        rows = None
        if tensor.shape:
            width = max(1, math.prod(tensor.shape[1:]))
            rows = slice(0, min(-(-_SAMPLED // width), tensor.shape[0]))
        values[name] = reader.read(tensor, rows).flatten()[:_SAMPLED]
    return _digest({name: tensor.shape for name, tensor in tensors.items()}, values)


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
