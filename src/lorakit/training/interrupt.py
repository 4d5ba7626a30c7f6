"""Stopping a run on Ctrl-C or SIGTERM: the step is finished and a checkpoint saved.

A second Ctrl-C leaves at once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from lorakit.errors import LorakitError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(LorakitError):
    """A run was stopped on request, with a checkpoint; it can be resumed."""

    exit_code = 130


class Interrupt(TrainerCallback):
    """Stops the run behind a step when it was asked to.

    Several processes must stop behind the same one: the trainer lets them agree when it counts
    the tokens of a step.

    Attributes:
        asked: this process was asked.
        agreed: a process of the run was asked before this step began.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.asked = self.agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals while the block runs; outside the main thread there are none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # What is ignored already (by nohup, or a shell behind `&`) stays so.
        heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._ask) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        # torchrun passes on Ctrl-C and sends SIGTERM behind it: that is one wish and not two.
        if not self.asked:
            self.say("finishing this step, then saving; once more leaves at once")
        self.asked = True

    def _stops(self, args: Any, state: Any) -> bool:
        wished = self.agreed if args.world_size > 1 else self.asked
        return wished and state.global_step < state.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._stops(args, state):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the run when the checkpoint is there.

        Raises:
            StoppedError: stopping was asked for.
        """
        if self._stops(args, state):
            option = "--continue" if args.save_only_model else "--resume"
            raise StoppedError(
                f"stopped after step {state.global_step} of {state.max_steps}, and saved: "
                f"resume with the same command and {option}"
            )
