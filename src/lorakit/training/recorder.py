"""What a run writes during training: files of JSON lines such as `metrics.jsonl`, and what it has
consumed, kept in each checkpoint so that a resumed run counts on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lorakit import atomic
from lorakit.errors import LorakitError

_KEPT = ("loss", "grad_norm", "learning_rate")
_COUNTS = "lorakit_counts.json"


@dataclass
class Counts:
    """What a run, all its processes, has consumed so far.

    Padding is not counted; `seconds` excludes evaluation.
    """

    train_tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0


def write_counts(checkpoint: Path, counts: Counts) -> None:
    """Writes them into a checkpoint that is being written."""
    (checkpoint / _COUNTS).write_text(json.dumps(asdict(counts)), encoding="utf-8")


def read_counts(checkpoint: Path) -> Counts:
    """What a run had consumed when `checkpoint` was written."""
    return Counts(**json.loads((checkpoint / _COUNTS).read_text("utf-8")))


class StepLines:
    """JSON Lines whose objects have a `step`; the main process alone writes.

    Args:
        path: the file.
        writes: False in other processes, where nothing happens.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def begin(self, step: int) -> None:
        """Drops the lines of steps after `step`, which will be made again; all of them for 0."""
        if not self.writes:
            return
        kept = [line for line in self._lines() if step and _step_of(line) <= step]
        atomic.write_file(self.path, "".join(f"{line}\n" for line in kept))

    def append(self, values: dict[str, Any]) -> None:
        """Adds one line."""
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The objects of all whole lines; a line that a kill cut off is left out."""
        return [json.loads(line) for line in self._lines() if _step_of(line) < float("inf")]

    def _lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines()


def _step_of(line: str) -> float:
    """The step of one line; a line that a kill cut off belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Recorder(TrainerCallback):
    """Keeps the training time in `counts` and appends what Trainer logs to `lines`.

    After resuming, lines of steps that will be made again are dropped. `metrics` are what the
    objective logs beside the loss.
    """

    def __init__(self, lines: StepLines, counts: Counts, metrics: Sequence[str] = ()) -> None:
        self.lines = lines
        self.kept = {*_KEPT, *metrics}
        self.counts = counts
        self._step_began = 0.0
        self._last_logged = Counts()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the lines up to the step that training goes on from."""
        self.lines.begin(state.global_step)
        self._last_logged = Counts(**vars(self.counts))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock of an optimiser step."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops it, before anything is logged, evaluated or saved."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is timed must have happened
        self.counts.seconds += time.perf_counter() - self._step_began

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Appends one line: the step, the epoch, what was logged, and tokens per second.

        Raises:
            LorakitError: the loss or the gradient is NaN or Inf.
        """
        logs = logs or {}
        values = {k: v for k, v in logs.items() if k in self.kept or k.startswith("eval_")}
        if not values:
            return
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(values.get(name, 0.0)):
                raise LorakitError(
                    f"the {what} is {values[name]} at step {state.global_step}: the steps are too "
                    "large (lower training.learning_rate), the dtype is too narrow "
                    "(dtype=float32), or the base model holds broken weights"
                )
        line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **values}
        if "loss" in values:
            line |= self._rates()
        self.lines.append(line)

    def _rates(self) -> dict[str, float]:
        before, now = self._last_logged, self.counts
        self._last_logged = Counts(**vars(now))
        seconds = max(now.seconds - before.seconds, 1e-9)
        return {
            "tokens_per_second": round((now.train_tokens - before.train_tokens) / seconds, 1),
            "supervised_tokens_per_second": round(
                (now.supervised_tokens - before.supervised_tokens) / seconds, 1
            ),
            "seconds": round(now.seconds, 3),
        }
