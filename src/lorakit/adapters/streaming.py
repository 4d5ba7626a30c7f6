"""Adapters merged into a model's files without loading the model: one tensor after the other.

Every tensor of the base is read in rows, changed as `plan.py` says, rounded once, checked and
written. What a layer makes of its rows is its own affair (`lora/layers/`), so that the result has
the bytes of a merge in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.adapters.job import MergeJob, Written, copy_others, exact_dtype
from lorakit.adapters.plan import Change, Entry, Plan, finish_plan, start_plan
from lorakit.adapters.survival import Survival
from lorakit.adapters.together import add_others
from lorakit.errors import InputError, LorakitError, listed
from lorakit.lora import LoraModel
from lorakit.lora.checkpoint import PREFIX, same_values
from lorakit.lora.layers.mergeable import merged_rows, row_blocks
from lorakit.models.load import set_padding
from lorakit.models.shards import (
    ShardReader,
    StoredTensor,
    all_tensors,
    new_shard,
    read_shards,
    write_index,
)
from lorakit.models.skeleton import file_names, skeleton


def stream(job: MergeJob, folder: Path) -> Written:
    """Writes the merged model into `folder`, file by file.

    Raises:
        InputError: the base cannot be read, or adapters do not fit it.
        LorakitError: merged values are not finite.
        NotStreamable: the model must be loaded; nothing is written.
    """
    shards = read_shards(job.path)
    tensors = all_tensors(shards)
    model = skeleton(job.first.task_type, job.path, exact_dtype(job, tensors), job.first.labels)
    stored = file_names(model, tensors)
    own = dict(model.state_dict(keep_vars=True))
    adapted = LoraModel.from_pretrained(model, job.first.folder)
    names = add_others(adapted, job.adapters, job.weights)
    with ShardReader() as reader:
        plan = start_plan(adapted.get_base_model(), own, shards, stored, names)
        for adapter in job.adapters:
            check_copies(plan, adapter.tensors, adapter.folder, reader)
        apart = come_apart(plan, reader)
        finish_plan(plan, own, shards, stored, apart, job.dtype)
        survival = write_merged(folder, plan, reader)
    config: Any = model.config
    if apart:
        config.tie_word_embeddings = False
        plan.notices.append(
            f"{listed(apart)} shared its values with another module and has its own now: "
            "tie_word_embeddings is false"
        )
    usual = plan.usual_dtype
    config.dtype, config.architectures = usual, [type(model).__name__]
    tokenizer = copy_others(job, folder)
    if tokenizer is not None:
        set_padding(model, tokenizer.pad_token_id)
    config.save_pretrained(folder)
    return Written(type(model), usual, plan.modules, survival, plan.notices)


@torch.no_grad()
def write_merged(folder: Path, plan: Plan, reader: ShardReader) -> Survival:
    """Writes the merged model's weights into `folder`.

    Returns: what of the updates survived the rounding.

    Raises:
        InputError: the base's files cannot be read, or hold values that are not finite.
        LorakitError: merged values are not finite, or beyond the written dtype.
    """
    survival = Survival()
    for file, entries in plan.shards.items():
        with new_shard(folder / file, {name: e.new for name, e in entries.items()}) as shard:
            for name, entry in entries.items():
                for before, total in _parts(entry, reader):
                    rounded = total.to(entry.new.dtype)
                    change, finite = entry.change, False
                    if change is not None and before is not None:
                        finite = survival.add(change.path, before, total, rounded)
                    if not finite:
                        _require_finite(name, entry, rounded)
                    shard.write(rounded)
                shard.finish(name)
    if len(plan.shards) > 1:
        write_index(
            folder,
            {f: {n: entry.new for n, entry in shard.items()} for f, shard in plan.shards.items()},
        )
    return survival


def come_apart(plan: Plan, reader: ShardReader) -> list[str]:
    """The parameters that were one with others in the base, and differ in the merged model."""
    return [
        other
        for one, other in plan.pairs
        if not all(
            torch.equal(a, b)
            for (_, a), (_, b) in zip(
                *(
                    _parts_of(plan.sources[key], plan.changes.get(key), reader)
                    for key in (one, other)
                ),
                strict=True,
            )
        )
    ]


def check_copies(
    plan: Plan, tensors: Mapping[str, torch.Tensor], folder: Path, reader: ShardReader
) -> None:
    """Checks the copies of frozen weights that PEFT adds to an adapter for embeddings and heads.

    Raises:
        InputError: a copy differs from the base's own weight, so it was resized or trained.
    """
    for key, copied in tensors.items():
        path = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
        source = plan.sources.get(f"{path}.weight")
        if source is None or not key.endswith(".base_layer.weight"):
            continue
        for rows in row_blocks(source.shape):
            if not same_values(copied[rows], reader.read(source, rows)):
                raise InputError(
                    f"{folder} brings its own {path} weight, which differs from the base's: it "
                    "was trained, which lorakit does not load yet"
                )


def _parts(entry: Entry, reader: ShardReader) -> Iterator[tuple[torch.Tensor | None, torch.Tensor]]:
    if entry.source is not None:
        yield from _parts_of(entry.source, entry.change, reader)
    elif entry.change is not None and entry.change.replaced is not None:
        yield None, entry.change.replaced


def _parts_of(
    source: StoredTensor, change: Change | None, reader: ShardReader
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of a tensor as they were, and with its change, not yet rounded."""
    if not source.shape:
        before = reader.read(source)
        yield before, before if change is None or change.replaced is None else change.replaced
        return
    if change is None or change.layer is None:
        for rows in row_blocks(source.shape):
            before = reader.read(source, rows)
            yield before, before if change is None else change.replaced[rows]  # type: ignore[index]
        return
    layer, parameter, names = change.layer, change.parameter, change.names
    module = layer.get_base_layer()
    place: nn.Parameter = getattr(module, parameter)
    updates = layer.row_updates(parameter, names)
    if updates is not None:
        for rows in row_blocks(source.shape):
            before = reader.read(source, rows)
            yield before, merged_rows(before, rows, updates, place.dtype)
        return
    before = reader.read(source)
    try:
        if place.is_meta:
            setattr(module, parameter, nn.Parameter(before.to(place.dtype), requires_grad=False))
        yield before, layer.merged_parameter(parameter, names)
    finally:
        setattr(module, parameter, place)


def _require_finite(name: str, entry: Entry, values: torch.Tensor) -> None:
    if values.dtype.itemsize == 1 or not values.is_floating_point() or _is_finite(values):
        return
    if entry.change is None and entry.source is not None and entry.new.code == entry.source.code:
        raise InputError(f"model: {entry.source.path}: {name} holds values that are not finite")
    dtype = str(entry.new.dtype).removeprefix("torch.")
    raise LorakitError(
        f"the merged model is not base + adapter: {name} has values that are not finite, or beyond "
        f"{dtype}. Nothing was written; try --dtype float32"
    )


def _is_finite(values: torch.Tensor) -> bool:
    # A sum is quicker; it may overflow where no value has.
    return bool(torch.isfinite(values.sum(dtype=torch.float32)) or torch.isfinite(values).all())
