"""An adapter's folder, as much of it as is there, in one dataclass for the page.

Only the adapter itself must be there and whole. Every other file is optional: what is missing, or
is damaged and left out, is in `notices`.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, Field, FiniteFloat, TypeAdapter, ValidationError

from lorakit.adapters.chat_template import template_notice
from lorakit.adapters.manifest import (
    MANIFEST_NAME,
    METRICS_NAME,
    MONITOR_NAME,
    SAMPLES_NAME,
    Manifest,
    read_manifest,
)
from lorakit.adapters.spectrum import Spectrum, spectra
from lorakit.adapters.updates import Skipped
from lorakit.lora.checkpoint import read_adapter, read_initial

if TYPE_CHECKING:
    from lorakit.lora.config import LoraConfig

Number = Annotated[float, Field(gt=-1e100, lt=1e100)]
"""One that can be drawn: sums and squares of such stay finite."""

Form = TypeVar("Form")


class AnswerFigures(BaseModel):
    """How many answers of rows are chosen (desirable) and rejected ones."""

    chosen: int
    rejected: int


class RowFigures(BaseModel):
    """Statistics of rows to learn from, or of held-out ones; lengths in tokens."""

    rows: int
    tokens: int
    supervised: int
    truncated: int = 0
    duplicates: int = 0
    empty_answers: int = 0
    lengths: dict[str, FiniteFloat] = {}
    histogram: list[tuple[FiniteFloat, FiniteFloat, int]] = []
    preferences: AnswerFigures | None = None


class TrainingWarning(BaseModel):
    """What was noticed while the run went on, with its cure."""

    step: int
    name: str = Field(alias="warning")
    message: str
    cure: str = ""


class RecipeAdvice(BaseModel):
    """A value that the recipe left out, and why it was chosen."""

    key: str
    value: Any
    why: str


class Turn(BaseModel):
    """One message of a sample's prompt; `content` is a text, or whatever the row held."""

    role: str
    content: Any = ""


class RecordedSample(BaseModel):
    """One held-out prompt with three answers: the row's, the base's, and the adapter's.

    The latter two have so many tokens, of `most_tokens` that they were allowed.
    """

    prompt: list[Turn]
    reference: str = ""
    base: str
    tuned: str
    base_tokens: int | None = None
    tuned_tokens: int | None = None
    most_tokens: int | None = None


class _Measured(BaseModel):
    """Norms of each module's gradient and ΔW at a step, a line of `monitor.jsonl`."""

    step: Number
    gradient_norm: list[float]
    update_norm: list[Number]


@dataclass(frozen=True)
class Movement:
    """How far the modules moved, measured while the run went on; Frobenius norms by module."""

    modules: list[str]
    weight_norms: list[float]
    measured: list[_Measured]

    def relative_updates(self) -> dict[str, float]:
        """‖ΔW‖ / ‖W‖ of every module at the last measurement."""
        rows = zip(self.modules, self.measured[-1].update_norm, self.weight_norms, strict=True)
        return {name: update / weight for name, update, weight in rows if weight > 0}

    def together(self) -> list[tuple[float, float]]:
        """‖ΔW‖ / ‖W‖ of all modules as one, by step."""
        whole = math.hypot(*self.weight_norms)
        return [(m.step, math.hypot(*m.update_norm) / whole) for m in self.measured if whole > 0]


@dataclass(frozen=True)
class RunRecord:
    """What an adapter's folder says of its run; whatever it does not say is None or empty.

    `metrics` are the usable lines of `metrics.jsonl` by step; `notices` is what is missing or was
    left out, a sentence each.
    """

    folder: Path
    config: LoraConfig
    parameters: int
    spectra: list[Spectrum]
    skipped: list[Skipped]
    manifest: Manifest | None = None
    data_statistics: dict[str, RowFigures] = field(default_factory=dict)
    warnings: list[TrainingWarning] = field(default_factory=list)
    advice: list[RecipeAdvice] = field(default_factory=list)
    run_notices: list[str] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    movement: Movement | None = None
    samples: list[RecordedSample] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) of every logged line that has `key`."""
        return [(line["step"], line[key]) for line in self.metrics if key in line]


def read_run(folder: str | Path) -> RunRecord:
    """Reads the adapter's folder and the record of its run.

    Raises:
        InputError: it holds no adapter, or the adapter or `lorakit.json` is damaged.
    """
    folder = Path(folder)
    config, tensors = read_adapter(folder)
    found, skipped = spectra(config, tensors, read_initial(folder))
    notices: list[str] = []
    manifest = read_manifest(folder)
    if manifest is None:
        notices.append(
            f"There is no {MANIFEST_NAME}, so lorakit did not train this adapter: losses before "
            "and after, data, recipe and versions are unknown."
        )
    base = manifest.base_model if manifest else config.base_model_name_or_path
    if config.task_type in (None, "CAUSAL_LM") and (notice := template_notice(folder, base)):
        notices.append(f"{notice}.")
    said = manifest.model_dump() if manifest else {}

    def part(key: str, form: type[Form]) -> Form | None:
        try:
            return TypeAdapter(form).validate_python(said[key]) if said.get(key) else None
        except ValidationError:
            notices.append(f"{MANIFEST_NAME}: {key} is not in a known form and is left out.")
            return None

    return RunRecord(
        folder=folder,
        config=config,
        parameters=sum(
            t.numel() for key, t in tensors.items() if not key.endswith(".base_layer.weight")
        ),
        spectra=found,
        skipped=skipped,
        manifest=manifest,
        data_statistics={
            name: split
            for name, split in (part("data_statistics", dict[str, RowFigures | None]) or {}).items()
            if split
        },
        warnings=part("warnings", list[TrainingWarning]) or [],
        advice=part("advice", list[RecipeAdvice]) or [],
        run_notices=part("notices", list[str]) or [],
        metrics=_read_metrics(folder, notices),
        movement=_read_movement(folder, notices),
        samples=_read_samples(folder, notices, asked=said.get("recipe", {}).get("samples") != 0),
        notices=notices,
    )


def _read_metrics(folder: Path, notices: list[str]) -> list[dict[str, float]]:
    lines = _lines(folder / METRICS_NAME, notices, "there are no curves")
    kept, not_finite = [], 0
    for line in lines:
        if not isinstance(line, dict) or not _is_usable(line.get("step")):
            continue
        numbers = {k: v for k, v in line.items() if isinstance(v, float | int)}
        finite = {k: float(v) for k, v in numbers.items() if _is_usable(v)}
        not_finite += len(numbers) - len(finite)
        kept.append(finite)
    _count(notices, METRICS_NAME, len(lines) - len(kept), len(lines))
    if not_finite:
        notices.append(f"{METRICS_NAME}: {not_finite} values are NaN or Inf: left out.")
    return sorted(kept, key=lambda line: line["step"])


def _read_movement(folder: Path, notices: list[str]) -> Movement | None:
    lines = _lines(folder / MONITOR_NAME, notices, "how modules moved is not known")
    if not lines:
        return None
    try:
        names, weights = lines[0]["modules"], [float(value) for value in lines[0]["weight_norm"]]
        if not all(isinstance(name, str) for name in names) or len(names) != len(weights):
            raise ValueError
    except (TypeError, KeyError, ValueError, OverflowError):
        notices.append(f"{MONITOR_NAME}: its first line does not name the modules: left out.")
        return None
    kept = []
    for line in lines[1:]:
        with suppress(ValidationError):
            row = _Measured.model_validate(line)
            if len(row.gradient_norm) == len(row.update_norm) == len(names):
                kept.append(row)
    _count(notices, MONITOR_NAME, len(lines) - 1 - len(kept), len(lines) - 1)
    return Movement(names, weights, kept) if kept else None


def _read_samples(folder: Path, notices: list[str], *, asked: bool) -> list[RecordedSample]:
    path = folder / SAMPLES_NAME
    if not path.is_file():
        if asked:
            notices.append(f"There is no {SAMPLES_NAME}: no answers before and after.")
        return []
    try:
        return TypeAdapter(list[RecordedSample]).validate_json(path.read_bytes())
    except (ValidationError, OSError):
        notices.append(f"{SAMPLES_NAME} is damaged and left out.")
        return []


def _lines(path: Path, notices: list[str], without: str) -> list[Any]:
    """The JSON values of a file's lines that are not empty; None for a damaged one."""
    if not path.is_file():
        notices.append(f"There is no {path.name}: {without}.")
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notices.append(f"{path.name} cannot be read ({error.strerror}): {without}.")
        return []
    return [_parsed(line) for line in text.split("\n") if line.strip()]


def _parsed(line: str) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def _count(notices: list[str], name: str, damaged: int, lines: int) -> None:
    if damaged:
        notices.append(f"{name}: {damaged} of {lines} lines are damaged and left out.")


def _is_usable(value: Any) -> bool:
    """Whether it is a `Number`."""
    return isinstance(value, float | int) and not isinstance(value, bool) and abs(value) < 1e100
