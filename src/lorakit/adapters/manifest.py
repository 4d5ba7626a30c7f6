"""`lorakit.json`: what is known of how an adapter came about, beside PEFT's two files.

Other tools ignore it. lorakit's verbs read it, so that an adapter's path is all they need.
"""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lorakit import atomic
from lorakit.errors import InputError

MANIFEST_NAME = "lorakit.json"

Record = TypeVar("Record", bound=BaseModel)

# What else a run leaves beside the adapter.
METRICS_NAME = "metrics.jsonl"
MONITOR_NAME = "monitor.jsonl"
SAMPLES_NAME = "samples.json"


class Manifest(BaseModel):
    """The record of one training run.

    `train_tokens` counts real tokens (no padding) over all epochs, `supervised_tokens` those that
    were learned; rates are per second of training, evaluation not counted. `run_seconds` go from
    the first step (after resuming, the first one then) to the last evaluation. Losses are in nats
    per supervised token on the held-out rows, None when none were held out. `advice` is what the
    recipe left out and got (key, value, why); `notices` and `warnings` are what was said before
    and during training; `continued` the steps behind which the recipe or the data changed. A
    classifier has `labels` (`id2label`, `label2id`, and the training rows'
    `counts`), and scores (accuracy, macro F1): its own, and those of the untrained head.
    `template_sha256` is the digest of the chat templates that rows were rendered with, None where
    no row was a conversation; `template_time` the local time that they wrote into rows, if any.
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
    labels: dict[str, Any] | None = None
    versions: dict[str, str]
    seed: int


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `lorakit.json` into an adapter's folder."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False)
    atomic.write_file(folder / MANIFEST_NAME, text + "\n")


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest in an adapter's folder; None when lorakit did not train it.

    What `combine` and its like leave there is no training run's: see `derived.py`.

    Raises:
        InputError: there is one, and it is damaged.
    """
    return read_record(folder, Manifest, made=False, again="train")


def read_record(folder: str | Path, form: type[Record], *, made: bool, again: str) -> Record | None:
    """`lorakit.json` in an adapter's folder, when it is of this form; else None.

    Args:
        made: whether it is the record of an adapter that was made out of others.
        again: what to do with the adapter when it is damaged.

    Raises:
        InputError: it is damaged.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return form.model_validate(values) if ("made_by" in values) == made else None
    except (ValidationError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: remove it, or {again} the adapter again") from error
