"""What a run writes while it goes on: `metrics.jsonl`, a line a logged step, and its times."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lorakit import atomic
from lorakit.errors import LorakitError
from lorakit.training.trainer import Counts

METRICS_NAME = "metrics.jsonl"
_KEPT = ("loss", "grad_norm", "learning_rate")


class Recorder(TrainerCallback):
    """Keeps the training time in `counts` and appends what Trainer logs to `metrics.jsonl`.

    After resuming, lines of steps that will be made again are dropped.
    """

    def __init__(self, folder: Path, counts: Counts) -> None:
        self.path = folder / METRICS_NAME
        self.counts = counts
        self._step_began = 0.0
        self._last_logged = Counts()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the lines up to the step that training goes on from."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= state.global_step]
        if state.global_step == 0:
            kept = []
        if state.is_world_process_zero:
            atomic.write_file(self.path, "".join(f"{line}\n" for line in kept))
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
        """Appends one line: the step, the epoch, what was logged, and tokens per second."""
        logs = logs or {}
        values = {k: v for k, v in logs.items() if k in _KEPT or k.startswith("eval_")}
        if not values or not state.is_world_process_zero:
            return
        if not math.isfinite(values.get("loss", 0.0)):
            raise LorakitError(
                f"the loss is {values['loss']} at step {state.global_step}: "
                "lower training.learning_rate, or look for broken rows"
            )
        line = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **values}
        if "loss" in values:
            line |= self._rates()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

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


def _step_of(line: str) -> float:
    """The step of one line; a line that a kill cut off belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
