"""How far a run is: a bar in a terminal or notebook, else a plain line for each logged step.

How it is shown is `lorakit.progress`'s; lines come between logged steps too where these are rare.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from lorakit.progress import Task, task
from lorakit.training.recorder import Counts


class ProgressBar(TrainerCallback):
    """Shows step, loss, held-out loss, supervised tokens per second, and the time left."""

    def __init__(self, counts: Counts, console: Console) -> None:
        self.counts, self.console = counts, console
        self._shown = ExitStack()
        self._task: Task | None = None
        self._loss = self._eval_loss = ""
        self._began_with = Counts()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar at the step that training goes on from."""
        self._began_with = Counts(**vars(self.counts))
        if state.is_world_process_zero:
            self._task = self._shown.enter_context(
                task("training", state.max_steps, state.global_step)
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar on."""
        if self._task:
            self._task.update(state.global_step, status=self._status())

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Takes over the newest losses; without a bar, prints them."""
        logs = logs or {}
        if "loss" in logs:
            self._loss = f"loss {logs['loss']:.4f}"
        if "eval_loss" in logs:
            self._eval_loss = f"eval {logs['eval_loss']:.4f}"
        if not self._task or not ("loss" in logs or "eval_loss" in logs):
            return
        self._task.update(state.global_step, status=self._status())
        if not self._live:
            left = f"  {self._task.clock_left} left" if self._task.left else ""
            step = f"step {state.global_step}/{state.max_steps}"
            self.console.print(f"{step}  {self._status()}{left}")
            self._task.said()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        self.close()

    def close(self) -> None:
        """Closes the bar, also when training ended early."""
        self._shown.close()
        self._task = None

    @property
    def _live(self) -> bool:
        return self.console.is_terminal or self.console.is_jupyter

    def _status(self) -> str:
        seconds = self.counts.seconds - self._began_with.seconds
        tokens = self.counts.supervised_tokens - self._began_with.supervised_tokens
        rate = f"{tokens / seconds:.0f} supervised tok/s" if seconds > 0 else ""
        return "  ".join(part for part in (self._loss, self._eval_loss, rate) if part)
