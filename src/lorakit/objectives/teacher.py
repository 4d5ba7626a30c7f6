"""The adapter that an objective learns from (`Objective.teacher`): whether it can be one.

It is loaded beside the adapter in training, on the same base, and never trained. The record of the
run names it with its hash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.adapters.adapter_files import read_files
from lorakit.adapters.lineage import digest, require_complete
from lorakit.adapters.manifest import FrozenRecord
from lorakit.errors import InputError
from lorakit.lora.vocabulary import embeddings, rows_in_file, vocabulary_size

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


def read_teacher(
    folder: str | Path, base: str, model: nn.Module, fingerprint: str | None
) -> FrozenRecord:
    """What the record of a run says of the adapter in `folder`.

    Args:
        base: the name of the run's base model.
        model: it, with the tokens that the run adds.
        fingerprint: of its weights.

    Raises:
        InputError: there is no adapter, or none that can be a teacher on this base.
    """
    try:
        files = read_files(folder, base)
        require_complete(folder, verb="used as a teacher")
    except InputError as error:
        raise InputError(f"objective.teacher: {error}") from error
    expected = files.record.base_fingerprint if files.record else None
    if None not in (expected, fingerprint) and expected != fingerprint:
        raise InputError(
            f"objective.teacher: {folder} was trained on other weights than those of {base}: "
            "teacher and student need the same base model"
        )
    if files.task_type != "CAUSAL_LM":
        raise InputError(
            f"objective.teacher: {folder} is an adapter for {files.task_type}: give one for "
            "CAUSAL_LM"
        )
    rows = max(filter(None, (rows_in_file(files.tensors, p) for p in embeddings(model))), default=0)
    if rows > (tokens := vocabulary_size(model)):
        raise InputError(
            f"objective.teacher: {folder} is for {rows} tokens, and the run's model has {tokens}: "
            "teacher and student need the same vocabulary (tokens in the recipe adds some)"
        )
    if files.config.bias != "none":
        raise InputError(
            f"objective.teacher: {folder} has biases of the base itself "
            f"(bias={files.config.bias}), which the student would have too: give an adapter "
            "without them"
        )
    return FrozenRecord(path=str(folder), sha256=digest(folder))
