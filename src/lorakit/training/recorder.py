"""What a run counts, writes and shows while it trains.

`metrics.jsonl` and the like are JSON lines; what was consumed is kept in each checkpoint, so that a
resumed run counts on. A terminal or notebook shows a bar (`lorakit.progress`), a log plain lines.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

from lorakit import atomic
from lorakit.errors import LorakitError
from lorakit.progress import Task, task

_KEPT = ("loss", "grad_norm", "learning_rate")
_COUNTS = "lorakit_counts.json"


@dataclass
class Counts:
    """What a run, all its processes, has consumed so far.

    Padding is not counted; `seconds` excludes evaluation, and sampling, which has its own.
    """

    train_tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    sampled_tokens: int = 0
    sampling_seconds: float = 0.0


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

    After resuming, lines of steps that will be made again are dropped, in `others` too. `metrics`
    are what the objective logs beside the loss; one that ends with `/` is the beginning of names.
    """

    def __init__(
        self,
        lines: StepLines,
        counts: Counts,
        metrics: Sequence[str] = (),
        others: Sequence[StepLines] = (),
    ) -> None:
        self.lines, self.counts, self.others = lines, counts, others
        self.kept = {*_KEPT, *metrics}
        self._begin = ("eval_", *(name for name in metrics if name.endswith("/")))
        self._step_began = 0.0
        self._last_logged = Counts()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for lines in (self.lines, *self.others):
            lines.begin(state.global_step)
        self._last_logged = replace(self.counts)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the clock, before anything is logged, evaluated or saved."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is timed must have happened
        self.counts.seconds += time.perf_counter() - self._step_began

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Appends one line: the step, the epoch, what was logged, and tokens per second.

        Raises:
            LorakitError: the loss or the gradient is NaN or Inf.
        """
        known = self.kept, self._begin
        values = {k: v for k, v in (logs or {}).items() if k in known[0] or k.startswith(known[1])}
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
            before, now = self._last_logged, self.counts
            self._last_logged = replace(now)
            seconds = max(now.seconds - before.seconds, 1e-9)
            supervised = now.supervised_tokens - before.supervised_tokens
            line |= {
                "tokens_per_second": round((now.train_tokens - before.train_tokens) / seconds, 1),
                "supervised_tokens_per_second": round(supervised / seconds, 1),
                "seconds": round(now.seconds, 3),
            }
            if sampled := now.sampled_tokens - before.sampled_tokens:
                took = max(now.sampling_seconds - before.sampling_seconds, 1e-9)
                line["sampled_tokens_per_second"] = round(sampled / took, 1)
                line["sampling_seconds"] = round(now.sampling_seconds, 3)
        self.lines.append(line)


Metrics = Sequence[str] | Mapping[str, str]


class ProgressBar(TrainerCallback):
    """Shows step, loss, held-out loss, supervised tokens per second, and the time left.

    Without a terminal each logged step is a plain line.

    Args:
        metrics: what is logged beside the loss and shown too; by name its label, or names alone.
    """

    def __init__(self, counts: Counts, console: Console, metrics: Metrics = ()) -> None:
        self.counts, self.console = counts, console
        self._shown = ExitStack()
        self._task: Task | None = None
        self._labels = dict(metrics) if isinstance(metrics, Mapping) else {}
        self._losses: dict[str, str] = dict.fromkeys(("loss", *metrics, "eval_loss"), "")
        self._began_with = Counts()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar at the step that training begins or is resumed at."""
        self._began_with = replace(self.counts)
        if state.is_world_process_zero:
            shown = task("training", state.max_steps, state.global_step)
            self._task = self._shown.enter_context(shown)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._task:
            self._task.update(state.global_step, status=self._status())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Takes over the newest losses; without a bar, prints them."""
        found = {name: value for name, value in (logs or {}).items() if name in self._losses}
        for name, value in found.items():
            label = self._labels.get(name, name.removesuffix("_loss"))
            self._losses[name] = f"{label} {value:.4f}"
        if not self._task or not found:
            return
        self._task.update(state.global_step, status=self._status())
        if not self.console.is_terminal and not self.console.is_jupyter:
            left = f"  {self._task.clock_left} left" if self._task.left else ""
            step = f"step {state.global_step}/{state.max_steps}"
            self.console.print(f"{step}  {self._status()}{left}")
            self._task.said()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the bar, also when training ended early."""
        self._shown.close()
        self._task = None

    def _status(self) -> str:
        seconds = self.counts.seconds - self._began_with.seconds
        tokens = self.counts.supervised_tokens - self._began_with.supervised_tokens
        rate = f"{tokens / seconds:.0f} supervised tok/s" if seconds > 0 else ""
        sampled = self.counts.sampled_tokens - self._began_with.sampled_tokens
        if sampled:
            took = self.counts.sampling_seconds - self._began_with.sampling_seconds
            rate += f"  {sampled / took:.0f} sampled tok/s"
        return "  ".join(part for part in (*self._losses.values(), rate) if part)
