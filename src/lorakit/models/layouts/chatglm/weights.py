"""The original files' tensors under transformers' names, each read when it is asked for.

Both of the published forms are read: safetensors, and torch's `.bin`, of which nothing but tensors
is ever unpickled. Names, shapes and dtypes are compared with the configuration before any value is
read.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.commands import quoted
from lorakit.errors import InputError, first_line, listed
from lorakit.models.layouts.chatglm.original import Original, native_config
from lorakit.models.layouts.layout import TensorSource
from lorakit.models.layouts.module_names import ModuleNames
from lorakit.models.shards import (
    INDEX_NAME,
    WEIGHTS_NAME,
    NewTensor,
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
_UNUSED = frozenset({"transformer.rotary_pos_emb.inv_freq"})  # computed anew

# Nothing is turned or permuted: GLM's rotary pairs are neighbours in both, and its gate stands
# before its up-projection in both.
NAMES = ModuleNames(
    code="ChatGLM's original code",
    models="ChatGLM2, ChatGLM3 and GLM-4",
    config="GlmConfig",
    layers="transformer.encoder.layers",
    native_layers="model.layers",
    in_layer={
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "post_attention_layernorm",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    outside={
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
    },
    fused={"self_attention.query_key_value": tuple(f"self_attn.{one}_proj" for one in "qkv")},
    tool="PEFT on ChatGLM's code",
    command=(
        "PeftModel.from_pretrained(AutoModel.from_pretrained({base!r}, trust_remote_code=True), "
        "{adapter!r})"
    ),
    templates=(
        "writes prompts by itself (build_chat_input): it has no place for the adapter's chat "
        "template"
    ),
)


@dataclass(frozen=True)
class Part:
    """A native tensor: the rows from `start` of the original tensor `name`, `shape[0]` of them."""

    name: str
    start: int
    shape: tuple[int, ...]


def parts(original: Original) -> dict[str, Part]:
    """Every native tensor by its name, in the order of transformers' model."""
    import torch
    from transformers import GlmForCausalLM

    try:
        with torch.device("meta"):
            model = GlmForCausalLM(native_config(original))
    except Exception as error:  # transformers and torch check values in many ways
        raise InputError(f"model: {original.path / 'config.json'}: {first_line(error)}") from error
    found: dict[str, Part] = {}
    ends: Counter[str] = Counter()
    for native, parameter in model.named_parameters():
        module, _, ending = native.rpartition(".")
        name = f"{NAMES.original_module(module)[0]}.{ending}"
        found[native] = Part(name, ends[name], tuple(parameter.shape))
        ends[name] += len(parameter)
    return found


def native_shards(original: Original, safetensors: bool) -> dict[str, dict[str, StoredTensor]]:
    """Where every native tensor lies in the original safetensors files, by file and native name."""
    path = original.path
    if not safetensors:
        _bin_files(path)
        raise InputError(
            f"model: {path} has its weights in {BIN_NAME} files, which cannot be read tensor by "
            "tensor: write them as safetensors with "
            f"lorakit convert {quoted(path)} -o DIR, and give DIR as the base model"
        )
    shards, wanted = read_shards(path), parts(original)
    _check(path, wanted, all_tensors(shards))
    found: dict[str, dict[str, StoredTensor]] = {}
    for native, part in wanted.items():
        file, stored = next((f, t[part.name]) for f, t in shards.items() if part.name in t)
        width = (stored.end - stored.begin) // stored.shape[0]
        begin = stored.begin + part.start * width
        end = begin + part.shape[0] * width
        own = StoredTensor(stored.code, part.shape, stored.path, begin, end)
        found.setdefault(file, {})[native] = own
    return {file: found[file] for file in sorted(found)}


def bin_sources(original: Original) -> dict[str, dict[str, TensorSource]]:
    """Every native tensor of mapped `.bin` files: values come into memory when they are copied."""
    files = {file: _load_bin(original.path / file) for file in _bin_files(original.path)}
    where: dict[str, str] = {}
    stored: dict[str, NewTensor] = {}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if name in where:
                raise InputError(f"model: {original.path}: {name} is in {where[name]} and {file}")
            where[name], stored[name] = file, NewTensor(_code(tensor), tuple(tensor.shape))
    wanted = parts(original)
    _check(original.path, wanted, stored)
    found: dict[str, dict[str, TensorSource]] = {}
    for native, part in wanted.items():
        file = where[part.name]
        values = files[file][part.name][part.start : part.start + part.shape[0]]
        new = NewTensor(_code(values), part.shape)
        found.setdefault(file, {})[native] = TensorSource(new, partial(_copied, values))
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
    """The names of the `.bin` files with weights."""
    if (path / BIN_INDEX_NAME).is_file():
        return list(read_index(path / BIN_INDEX_NAME))
    if (path / BIN_NAME).is_file():
        return [BIN_NAME]
    raise InputError(
        f"model: {path} has no weights: there is neither {WEIGHTS_NAME} nor {BIN_NAME}, nor an "
        f"index of several ({INDEX_NAME}): {_FETCH}"
    )


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch's, mapped; anything else in it is refused."""
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
                f"model: {path} is not a file of tensors written by torch 1.6 or newer, or is "
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


def _check(path: Path, wanted: Mapping[str, Part], tensors: Mapping[str, NewTensor]) -> None:
    """Raises InputError unless names, shapes and dtypes of the tensors are as configured."""
    # The last part of a tensor ends where the tensor does.
    expected = {p.name: (p.start + p.shape[0], *p.shape[1:]) for p in wanted.values()}
    if missing := [name for name in expected if name not in tensors]:
        raise InputError(f"model: {path} lacks {listed(missing, 3)} in its files: {_FETCH}")
    if more := sorted(tensors.keys() - expected.keys() - _UNUSED):
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
