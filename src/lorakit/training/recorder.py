"""What a run writes while it goes on: `metrics.jsonl`, a line a logged step, and its times."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from lorakit.errors import LorakitError
from lorakit.training.counts import Counts
from lorakit.training.step_lines import StepLines

_KEPT = ("loss", "grad_norm", "learning_rate")


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
            LorakitError: the loss or the gradient is no number.
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
