"""Training one configuration after the other, each as `lorakit train` would."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback

from lorakit.adapters.manifest import METRICS_NAME
from lorakit.errors import LorakitError
from lorakit.progress import innermost
from lorakit.sweeps.ground import Ground
from lorakit.sweeps.row_losses import SplitLosses
from lorakit.sweeps.runner import Configuration, Progress
from lorakit.training.checkpoints import newest_whole
from lorakit.training.counts import Counts
from lorakit.training.interrupt import Interrupt, StoppedError
from lorakit.training.position import planned_steps
from lorakit.training.recorder import Recorder
from lorakit.training.setup import Setup, set_up
from lorakit.training.step_lines import StepLines
from lorakit.training.trainer import LoraTrainer
from lorakit.training.unchanged import warn_of_unchanged


class SoloRunner:
    """Trains configurations by themselves, on the base that they share.

    Args:
        ground: base model and rows.
        say: shows a line to the user.
    """

    def __init__(self, ground: Ground, say: Callable[[str], None]) -> None:
        self.ground, self.say = ground, say

    def advance(self, configurations: Sequence[Configuration], to: float) -> dict[str, Progress]:
        """Trains each to the share `to` of its steps; see `Runner`.

        Raises:
            StoppedError: Ctrl-C or SIGTERM; the step was finished and saved.
        """
        return {c.name: self._advance(c, to) for c in configurations}

    def _advance(self, configuration: Configuration, to: float) -> Progress:
        begun = self.ground.beginning(configuration.recipe)
        # Held-out rows are the sweep's to look at, and not Trainer's.
        alone = replace(begun, data=replace(begun.data, eval=[], eval_samples=[]))
        setup = set_up(configuration.recipe, alone)
        try:
            trainer = setup.trainer()
            planned = planned_steps(trainer.args, len(trainer.sampler))
            diverged = self._train(trainer, setup, step_at(to, planned))
            step = trainer.state.global_step
            losses: SplitLosses = {}
            if diverged is None:
                losses = self.ground.losses(setup.model)
                diverged = broken(losses, step)
            if to == 1 and diverged is None:
                setup.model.save_pretrained(configuration.recipe.output_dir)
                if trainer.start is not None:
                    lines = StepLines(Path(configuration.recipe.output_dir) / METRICS_NAME)
                    list(warn_of_unchanged(trainer.start, setup.model, step, lines))
        finally:
            setup.model.unload()
        return Progress(
            step=step,
            planned=planned,
            losses={} if diverged else losses,
            diverged=diverged,
            train_losses=[
                (entry["step"], entry["loss"])
                for entry in trainer.state.log_history
                if math.isfinite(entry.get("loss", math.nan))
            ],
            seconds=trainer.counts.seconds,
        )

    def _train(self, trainer: LoraTrainer, setup: Setup, target: int) -> str | None:
        """Trains to the step `target`; returns what was no number."""
        folder = Path(setup.recipe.output_dir)
        found = newest_whole(folder)
        for line in found.damaged:
            self.say(f"{folder.name}: {line}")
        checkpoint = found.checkpoint
        if checkpoint and found.step >= target:
            trainer.take_up(checkpoint)
            return None
        folder.mkdir(parents=True, exist_ok=True)
        interrupt = Interrupt(self.say)
        trainer.interrupt = interrupt
        until = _Until(target, StepLines(folder / METRICS_NAME), trainer.counts)
        trainer.remove_callback(PrinterCallback)
        for callback in (interrupt, until):
            trainer.add_callback(callback)
        with interrupt.listening(), setup.fast():
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if interrupt.asked:  # in the last step, which a run does not stop behind
            raise StoppedError("stopped, and saved: the same command with --resume goes on")
        return until.diverged


def step_at(share: float, planned: int) -> int:
    """The optimiser step at a share of a run of so many steps; the first one at the least."""
    return min(planned, max(1, math.ceil(share * planned - 1e-9)))


def broken(losses: SplitLosses, step: int) -> str | None:
    """What is no number among held-out losses, or None."""
    for name, rows in losses.items():
        if not all(math.isfinite(nats) for nats, _ in rows):
            return f"the loss of the {name} rows at step {step}"
    return None


class _Until(Recorder):
    """Saves and ends a run at a step; ends it without saving when something is no number.

    Attributes:
        diverged: what was no number, or None.
    """

    def __init__(self, target: int, lines: StepLines, counts: Counts) -> None:
        super().__init__(lines, counts)
        self.target = target
        self.diverged: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts from the step that training goes on from."""
        super().on_train_begin(args, state, control, **kwargs)
        self._share = 1 / max(1, self.target - state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the run where it should; comes behind all that ask for saving."""
        innermost().advance(self._share)
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step >= self.target:
            control.should_save = control.should_training_stop = True
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        if control.should_save and not all(torch.isfinite(p).all() for p in trained):
            self._drop(control, f"a weight at step {state.global_step}")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the recorder's; what is no number ends this run and no other."""
        try:
            super().on_log(args, state, control, logs, **kwargs)
        except LorakitError:
            names = [k for k in ("loss", "grad_norm") if not math.isfinite((logs or {}).get(k, 0))]
            what = "the loss" if "loss" in names else "the gradient"
            self._drop(control, f"{what} at step {state.global_step}")

    def _drop(self, control: Any, what: str) -> None:
        self.diverged = self.diverged or what
        control.should_save, control.should_training_stop = False, True
