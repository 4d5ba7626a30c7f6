"""Adapters merged into a model's files without loading the model: one tensor after the other.

Every tensor of the base is read in rows, changed as `plan.py` says, rounded once, checked and
written. What a layer makes of its rows is its own affair (`lora/layers/`), so that the result has
the bytes of a merge in memory.
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lorakit.adapters.adapter_files import AdapterFiles
from lorakit.adapters.added_tokens import add_rows, added_tokens_notice
from lorakit.adapters.derived import other_weights
from lorakit.adapters.job import MergedFiles, MergeJob, add_others, copy_others, exact_dtype
from lorakit.adapters.plan import (
    Entry,
    MergePlan,
    NotStreamable,
    ParameterChange,
    finish_plan,
    start_plan,
)
from lorakit.adapters.updates import COPY
from lorakit.adapters.verify import Survival, sum_of_squares
from lorakit.errors import InputError, LorakitError, listed
from lorakit.lora import LoraModel
from lorakit.lora.checkpoint import PREFIX, same_values
from lorakit.lora.layers.weight_updates import RowUpdate, in_part, merged_rows, row_blocks
from lorakit.lora.vocabulary import require_same_base, vocabulary_size
from lorakit.models.fingerprint import fingerprint_of_files
from lorakit.models.layouts import layout_of
from lorakit.models.load import set_padding
from lorakit.models.shards import ShardReader, StoredTensor, all_tensors, new_shard, write_index
from lorakit.models.skeleton import FileNames, file_names, read_base_config, skeleton
from lorakit.progress import task

_MOST_THREADS = 8
_AHEAD = _MOST_THREADS  # parts that are computed before their turn to be written


def stream(job: MergeJob, folder: Path) -> MergedFiles:
    """Writes the merged model into `folder`, file by file.

    Raises:
        InputError: the base cannot be read, or adapters do not fit it.
        LorakitError: merged values are NaN or Inf.
        NotStreamable: the model must be loaded; nothing is written.
    """
    shards = layout_of(job.path).shards()
    tensors = all_tensors(shards)
    model = skeleton(job.path, job.first.task_type, exact_dtype(job, tensors), job.first.labels)
    before = vocabulary_size(model)
    added = add_rows(model, job.first)
    if vocabulary_size(model) < before:
        raise NotStreamable("the adapter is for fewer rows of embeddings than the base has")
    stored = file_names(model, tensors)
    own = dict(model.state_dict(keep_vars=True))
    parameters = [name for name, _ in model.named_parameters()]
    adapted = LoraModel.from_pretrained(model, job.first.folder)
    weights = add_others(adapted, job.adapters, job.weights, added)
    with ShardReader(tensor.path for tensor in tensors.values()) as reader:
        plan = start_plan(adapted.get_base_model(), own, shards, stored, weights)
        for adapter, name in zip(job.adapters, weights, strict=True):
            trained = adapted.adapter_tensors(name)
            copies = {
                k: t for k, t in adapter.tensors.items() if k not in trained or k.endswith(COPY)
            }
            check_copies(plan, own, adapter, copies, reader)
            check_fingerprint(plan, parameters, adapter, reader)
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
    whole = _whole_config(job, model, plan, stored)
    if added:
        plan.notices.append(added_tokens_notice(added, job.first))
    tokenizer = copy_others(job, folder, vocabulary_size(model))
    if tokenizer is not None:
        set_padding(model, tokenizer.pad_token_id)
    _save_config(config, whole, folder)
    return MergedFiles(type(model), usual, plan.modules, survival, plan.notices)


def _whole_config(job: MergeJob, model: Any, plan: MergePlan, stored: FileNames) -> Any:
    """The base's own configuration, where the model is only a part of what its files hold.

    A model for pictures too is merged as its language part. The other parts' tensors go along, and
    so does what makes a model of them. None where nothing goes along.
    """
    config = read_base_config(job.path)
    written = {name for entries in plan.shards.values() for name in entries}
    part = type(config.get_text_config()) is type(model.config) is not type(config)
    return config if part and stored.unused & written else None


def _save_config(config: Any, whole: Any, folder: Path) -> None:
    """Writes a model's configuration; into the one of the `whole` that it is a part of, if any."""
    if whole is None:
        config.save_pretrained(folder)
        return
    text = whole.get_text_config()
    for field in ("vocab_size", "pad_token_id", "tie_word_embeddings", "dtype"):
        setattr(text, field, getattr(config, field))
    whole.dtype, whole.tie_word_embeddings = config.dtype, config.tie_word_embeddings
    whole.save_pretrained(folder)


def write_merged(folder: Path, plan: MergePlan, reader: ShardReader) -> Survival:
    """Writes the merged model's weights into `folder`: several threads compute, this one writes.

    Returns: what of the updates survived the rounding.
    """
    survival = Survival()
    values = sum(entry.new.size for entries in plan.shards.values() for entry in entries.values())
    with _threads() as threads, task("merging, in MB", values / 1e6) as work:
        for file, entries in plan.shards.items():
            jobs = (
                partial(_round, name, entry, part)
                for name, entry in entries.items()
                for part in _parts(entry.source, entry.change, reader)
            )
            with new_shard(folder / file, {n: e.new for n, e in entries.items()}) as shard:
                for rounded in _in_order(threads, jobs):
                    shard.write(rounded.name, rounded.values)
                    work.advance(rounded.values.numel() * rounded.values.element_size() / 1e6)
                    change = entries[rounded.name].change
                    if change is not None and rounded.delta is not None:
                        survival.add(change.path, rounded.delta, rounded.error)
    if len(plan.shards) > 1:
        write_index(
            folder,
            {f: {n: e.new for n, e in entries.items()} for f, entries in plan.shards.items()},
        )
    return survival


def come_apart(plan: MergePlan, reader: ShardReader) -> list[str]:
    """The parameters that were one with others in the base, and differ in the merged model."""
    apart = []
    for pair in plan.pairs:
        one, other = (_parts(plan.sources[key], plan.changes.get(key), reader) for key in pair)
        same = (torch.equal(a().values, b().values) for a, b in zip(one, other, strict=True))
        if not all(same):
            apart.append(pair[1])
    return apart


def check_fingerprint(
    plan: MergePlan, parameters: Sequence[str], adapter: AdapterFiles, reader: ShardReader
) -> None:
    """Adds a notice where the adapter's record tells of other weights than the base's."""
    expected = adapter.manifest and adapter.manifest.base_fingerprint
    there = {name: plan.sources[name] for name in parameters if name in plan.sources}
    new = {key for key, change in plan.changes.items() if change.replaced is not None}
    if not expected or not set(parameters) <= there.keys() | new:
        return
    if fingerprint_of_files(there, reader) != expected:
        plan.notices.append(other_weights(adapter.folder, adapter.base_model))


def check_copies(
    plan: MergePlan,
    own: Mapping[str, torch.Tensor],
    adapter: AdapterFiles,
    copies: Mapping[str, torch.Tensor],
    reader: ShardReader,
) -> None:
    """Checks `copies` of frozen weights, which PEFT adds to an adapter for embeddings and heads.

    Raises:
        InputError: a copy is of another base.
        NotStreamable: it is not the base's own weight, and a layer adapts it.
    """
    for key, copied in copies.items():
        path = re.sub(r"(\.token_adapter)?(\.base_layer)?\.weight$", "", key.removeprefix(PREFIX))
        name = f"{path}.weight"
        if (source := plan.sources.get(name)) is None:
            continue
        what = f"{adapter.folder} brings its own {path} weight"
        if key.endswith(COPY) and (
            copied.shape != source.shape
            or not all(
                same_values(copied[rows], reader.read(source, rows))
                for rows in row_blocks(source.shape)
            )
        ):
            raise NotStreamable(what)
        if not own[name].is_meta:  # of a module that no adapter trains
            require_same_base(copied[:1], reader.read(source, slice(0, 1)), what)


@dataclass(frozen=True)
class _Merged:
    """Some rows of a tensor, not yet rounded, and ‖ΔW‖² where something was added to them."""

    values: torch.Tensor
    delta: float | None = None


class _Rounded(NamedTuple):
    """Some rows of the tensor `name` as they are written, ‖ΔW‖², and the square of the error."""

    name: str
    values: torch.Tensor
    delta: float | None
    error: float


_Part = Callable[[], _Merged]


def _parts(
    source: StoredTensor | None, change: ParameterChange | None, reader: ShardReader
) -> Iterator[_Part]:
    """What has to be done for one tensor, row by row as far as that is possible."""
    if change is not None and change.replaced is not None:
        replaced = change.replaced
        there = source if source is not None and source.shape == replaced.shape else None
        for part in row_blocks(tuple(replaced.shape)) if replaced.shape else [None]:
            yield partial(_replaced, there, replaced, change.weight, part, reader)
        return
    assert source is not None
    if change is None or change.layer is None:
        for part in row_blocks(source.shape) if source.shape else [None]:
            yield partial(_unchanged, source, part, reader)
        return
    updates = change.layer.row_updates(change.parameter, change.names)
    if updates is None:
        yield partial(_whole, source, change, reader)
        return
    dtype = getattr(change.layer.get_base_layer(), change.parameter).dtype
    energy = change.layer.update_energy(change.names)
    for rows in row_blocks(source.shape):
        yield partial(_added, source, rows, updates, dtype, energy, reader)
        energy = energy and 0.0  # the whole weight's is counted once


def _unchanged(source: StoredTensor, rows: slice | None, reader: ShardReader) -> _Merged:
    return _Merged(reader.read(source, rows))


def _replaced(
    source: StoredTensor | None,
    replaced: torch.Tensor,
    weight: float,
    rows: slice | None,
    reader: ShardReader,
) -> _Merged:
    V = replaced if rows is None else replaced[rows]
    if source is None:  # it is new, or has more tokens
        return _Merged(V)
    W = reader.read(source, rows)
    total = in_part(W.to(replaced), V, weight)
    return _Merged(total, sum_of_squares(total - W))


def _added(
    source: StoredTensor,
    rows: slice,
    updates: list[RowUpdate],
    dtype: torch.dtype,
    energy: float | None,
    reader: ShardReader,
) -> _Merged:
    W = reader.read(source, rows)
    total = merged_rows(W, rows, updates, dtype)
    return _Merged(total, sum_of_squares(total - W) if energy is None else energy)


def _whole(source: StoredTensor, change: ParameterChange, reader: ShardReader) -> _Merged:
    """For a layer whose rows depend on each other: it gets its weight for a moment."""
    assert change.layer is not None
    module = change.layer.get_base_layer()
    place: nn.Parameter = getattr(module, change.parameter)
    before = reader.read(source).to(place.dtype)
    if not place.is_meta:  # a bias that was trained
        before = in_part(before, place.detach(), change.weight)
    setattr(module, change.parameter, nn.Parameter(before, requires_grad=False))
    try:
        total = change.layer.merged_parameter(change.parameter, change.names)
    finally:
        setattr(module, change.parameter, place)
    delta = sum(sum_of_squares(total[r] - before[r]) for r in row_blocks(source.shape))
    return _Merged(total, delta)


@torch.no_grad()
def _round(name: str, entry: Entry, part: _Part) -> _Rounded:
    """Computes a part, rounds it, and checks that it is finite."""
    merged = part()
    total, delta = merged.values, merged.delta
    values = total.to(entry.new.dtype)
    error = 0.0
    if delta is not None and values is not total:
        error = sum_of_squares(total.sub_(values))  # NaN or Inf where a value is
    if delta is None or values is total or not math.isfinite(error):
        _require_finite(name, entry, values)
    return _Rounded(name, values, delta, error)


def _require_finite(name: str, entry: Entry, values: torch.Tensor) -> None:
    if values.dtype.itemsize == 1 or not values.is_floating_point() or _is_finite(values):
        return
    if entry.is_buffer and entry.change is None:
        return
    if entry.source is not None:
        with ShardReader([entry.source.path]) as reader:
            if not _is_finite(reader.read(entry.source)):
                raise InputError(f"model: {entry.source.path}: {name} holds NaN or Inf")
    dtype = str(entry.new.dtype).removeprefix("torch.")
    raise LorakitError(
        f"the merged model is not base + adapter: {name} has NaN or Inf, or values beyond "
        f"{dtype}. Nothing was written; try --dtype float32"
    )


def _is_finite(values: torch.Tensor) -> bool:
    # A sum is quicker; it may overflow where no value has.
    return bool(torch.isfinite(values.sum(dtype=torch.float32)) or torch.isfinite(values).all())


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads of which each computes its own rows, so that torch needs none of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
            yield threads
    finally:
        torch.set_num_threads(before)


def _in_order(
    threads: ThreadPoolExecutor, jobs: Iterable[Callable[[], _Rounded]]
) -> Iterator[_Rounded]:
    """The results in the order of the jobs, of which only a few are computed ahead."""
    running: deque[Future[_Rounded]] = deque()
    try:
        for job in jobs:
            running.append(threads.submit(job))
            if len(running) > _AHEAD:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for job_left in running:
            job_left.cancel()
