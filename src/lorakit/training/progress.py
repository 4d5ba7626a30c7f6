"""The progress bar of a run, the same in a terminal and a notebook.

Where neither is there (a log file, a pipe) it is a plain line for each logged step instead.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from lorakit.training.trainer import Counts


class ProgressBar(TrainerCallback):
    """Shows step, loss, held-out loss, supervised tokens per second, and the time left."""

    def __init__(self, counts: Counts, console: Console) -> None:
        self.counts, self.console = counts, console
        self._bar: Progress | None = None
        self._task: Any = None
        self._loss = self._eval_loss = ""
        self._began_with = Counts()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar at the step that training goes on from."""
        self._began_with = Counts(**vars(self.counts))
        if not state.is_world_process_zero or not self._live:
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar.start()
        self._task = self._bar.add_task(
            "", total=state.max_steps, completed=state.global_step, status=""
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar on."""
        if self._bar:
            self._bar.update(self._task, completed=state.global_step, status=self._status())

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Takes over the newest losses; without a bar, prints them."""
        logs = logs or {}
        if "loss" in logs:
            self._loss = f"loss {logs['loss']:.4f}"
        if "eval_loss" in logs:
            self._eval_loss = f"eval {logs['eval_loss']:.4f}"
        if not state.is_world_process_zero or not ("loss" in logs or "eval_loss" in logs):
            return
        if self._bar:
            self._bar.update(self._task, status=self._status())
        elif not self._live:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {self._status()}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        self.close()

    def close(self) -> None:
        """Closes the bar, also when training ended early."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    @property
    def _live(self) -> bool:
        return self.console.is_terminal or self.console.is_jupyter

    def _status(self) -> str:
        seconds = self.counts.seconds - self._began_with.seconds
        tokens = self.counts.supervised_tokens - self._began_with.supervised_tokens
        rate = f"{tokens / seconds:.0f} supervised tok/s" if seconds > 0 else ""
        return "  ".join(part for part in (self._loss, self._eval_loss, rate) if part)
