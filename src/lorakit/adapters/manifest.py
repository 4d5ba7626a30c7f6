"""`lorakit.json`: what is known of how an adapter came about, beside PEFT's two files.

A training run leaves a `Manifest`, a verb that makes an adapter out of others or out of models a
`Derivation`. Other tools ignore it; lorakit's verbs need only the adapter's path because of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lorakit import atomic
from lorakit.errors import InputError
from lorakit.version import __version__

MANIFEST_NAME = "lorakit.json"

# What else a run leaves beside the adapter.
METRICS_NAME = "metrics.jsonl"
MONITOR_NAME = "monitor.jsonl"
SAMPLES_NAME = "samples.json"
COMPLETIONS_NAME = "completions.jsonl"
HELD_OUT_REWARDS_NAME = "held_out_rewards.json"


class SourceRecord(BaseModel):
    """What an adapter was made of: where it lay, and the SHA-256 of its weights' file or files."""

    path: str
    sha256: str | None = None


class FrozenRecord(BaseModel):
    """A frozen adapter that another one is added to; `sha256` is `lineage.digest` of its files."""

    path: str
    sha256: str


class ParentRecord(FrozenRecord):
    """The adapter that a run started from, how, and the one that this one had started from."""

    mode: Literal["continue", "freeze"]
    parent: ParentRecord | None = None


class Manifest(BaseModel):
    """The record of one training run.

    `train_tokens` counts real tokens (no padding) over all epochs, `supervised_tokens` those that
    were learned; rates are per second of training, evaluation not counted. `run_seconds` go from
    the first step (after resuming, the first one then) to the last evaluation. Losses are in nats
    per supervised token on the held-out rows, None when none were held out. `advice` is what the
    recipe left out and got (key, value, why); `notices` and `warnings` are those given before
    and during training; `continued` the steps behind which the recipe or the data changed. A
    classifier has `labels` (`id2label`, `label2id`, and the training rows'
    `counts`), and scores (accuracy, macro F1): its own, and those of the untrained head.
    `template_sha256` is the digest of the chat templates that rows were rendered with, None where
    no row was a conversation; `template_time` the local time that they wrote into rows, if any.
    `parent` is the adapter that the run started from, `stands_on` the frozen ones that its own is
    added to, and `start_eval_loss` and `start_eval_scores` are those of the start. `teacher` is the
    adapter that a distillation learned from; `rewards` what a run's rewards were, each with the
    SHA-256 of its files, and `environment` those of the files of environment and tools, by name.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    base_model: str
    recipe: dict[str, Any]
    data: list[dict[str, Any]]
    data_statistics: dict[str, dict[str, Any]] = {}
    template_sha256: str | None = None
    template_time: str | None = None
    base_fingerprint: str | None = None
    advice: list[dict[str, Any]] = []
    notices: list[str] = []
    warnings: list[dict[str, Any]] = []
    continued: list[dict[str, Any]] = []
    processes: int = 1
    steps: int
    train_seconds: float
    run_seconds: float | None = None
    train_tokens: int
    supervised_tokens: int
    tokens_per_second: float
    peak_memory_mb: float
    padding_free: bool | None = None
    compiled: bool = False
    eval_loss: float | None
    base_eval_loss: float | None
    eval_scores: dict[str, float] | None = None
    base_eval_scores: dict[str, float] | None = None
    start_eval_loss: float | None = None
    start_eval_scores: dict[str, float] | None = None
    parent: ParentRecord | None = None
    stands_on: list[FrozenRecord] = []
    teacher: FrozenRecord | None = None
    rewards: list[dict[str, Any]] = []
    environment: dict[str, str] = {}
    labels: dict[str, Any] | None = None
    versions: dict[str, str]
    seed: int


class Derivation(BaseModel):
    """How an adapter came about that no run trained.

    `options` are the verb's, `figures` what it measured; `base_fingerprint`, `labels` and
    `template_sha256` are the sources', where these know them.
    """

    model_config = ConfigDict(extra="allow")

    made_by: Literal["combine", "resize", "extract"]
    sources: list[SourceRecord] = []
    options: dict[str, Any] = {}
    figures: dict[str, float] = {}
    notices: list[str] = []
    base_model: str | None = None
    base_fingerprint: str | None = None
    template_sha256: str | None = None
    labels: dict[str, Any] | None = None
    versions: dict[str, str] = {"lorakit": __version__}


def write_manifest(folder: Path, record: Manifest | Derivation) -> None:
    """Writes `lorakit.json` into an adapter's folder."""
    text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False)
    atomic.write_file(folder / MANIFEST_NAME, text + "\n")


def read_record(folder: str | Path) -> Manifest | Derivation | None:
    """`lorakit.json` in an adapter's folder; None where there is none.

    Raises:
        InputError: it is damaged.
    """
    path, again = Path(folder) / MANIFEST_NAME, "train"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "made_by" not in values:
            return Manifest.model_validate(values)
        again = "make"
        return Derivation.model_validate(values)
    except (ValidationError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: remove it, or {again} the adapter again") from error


def read_manifest(folder: str | Path) -> Manifest | None:
    """The record of the training run; None for an adapter that lorakit did not train."""
    record = read_record(folder)
    return record if isinstance(record, Manifest) else None
