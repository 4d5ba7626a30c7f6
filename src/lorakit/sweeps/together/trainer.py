"""The trainer of one configuration: stops at a step, and at a loss that is no number.

It is `lorakit train`'s trainer, whose loss may come from a batch that others are in too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from lorakit.adapters.manifest import METRICS_NAME
from lorakit.errors import LorakitError
from lorakit.objectives.forward import Forward
from lorakit.progress import innermost
from lorakit.training.early_stopping import EarlyStopping
from lorakit.training.interrupt import Interrupt
from lorakit.training.recorder import Recorder
from lorakit.training.setup import Setup
from lorakit.training.step_lines import StepLines
from lorakit.training.trainer import LoraTrainer, SaveAfterEvaluation

Join = Callable[[dict[str, torch.Tensor], torch.Tensor | int], torch.Tensor]
"""Takes a batch and what its loss is divided by; gives the loss when its gradients are there."""


class DivergedError(LorakitError):
    """A configuration's loss or gradient is no number; others are none the worse for it."""


class ConfigurationTrainer(LoraTrainer):
    """Trains one configuration up to some step of its whole run.

    Args:
        setup: the run; its model is the adapter's share, or a model of its own.
        loss: of the whole model.
        target: the optimiser step behind which it stops, with a checkpoint.
        interrupt: the wish to stop, which all configurations share.
        own_clock: whether the time between a step's begin and end is its own.

    Attributes:
        join: where the loss comes from; None computes it on the model alone.
    """

    def __init__(
        self, setup: Setup, loss: Any, target: int, interrupt: Interrupt, *, own_clock: bool
    ) -> None:
        self.join: Join | None = None
        super().__init__(
            setup.model,
            setup.arguments,
            setup.data.train,
            setup.data.eval,
            setup.batching,
            setup.begun.objective,
            forward=Forward(setup.model, loss),
            loraplus_lr_ratio=setup.recipe.training.loraplus_lr_ratio,
        )
        self.interrupt, self.templates = interrupt, setup.begun.templates
        self.lines = StepLines(Path(setup.recipe.output_dir) / METRICS_NAME)
        self.remove_callback(PrinterCallback)
        recorder = Recorder if own_clock else _RecorderWithoutClock
        looking: list[TrainerCallback] = [recorder(self.lines, self.counts)]
        if patience := setup.recipe.early_stopping_patience:
            looking.append(EarlyStopping(patience))
        for callback in (*looking, _StopAt(target), interrupt, SaveAfterEvaluation()):
            self.add_callback(callback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As in a run of its own; with `join` its gradients are there already.

        Raises:
            DivergedError: it is no number.
        """
        if self.join is None:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            assert num_items_in_batch is not None
            state = self.accelerator.gradient_state  # one for all trainers of a process
            whole_step = state.sync_gradients
            loss = self.join(inputs, num_items_in_batch).requires_grad_()
            state._set_sync_gradients(whole_step)
        self._require_number("loss", loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._require_number("norm of the gradient", norm)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As LoraTrainer's; weights that are no numbers are not kept: nobody could go on from them.

        Raises:
            DivergedError: there are such weights.
        """
        if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            raise DivergedError(f"a weight is no number at step {self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _require_number(self, what: str, value: Any) -> None:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
        if not math.isfinite(number):
            raise DivergedError(f"the {what} is {number} at step {self.state.global_step + 1}")


class _StopAt(TrainerCallback):
    """Stops with a checkpoint behind a step; comes before what puts saving off."""

    def __init__(self, target: int) -> None:
        self.target = target

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts from the step that training goes on from."""
        self._share = 1 / max(1, self.target - state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for both."""
        innermost().advance(self._share)
        if state.global_step >= self.target:
            control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch in whose middle training stops has not ended: nothing is due."""
        if control.should_training_stop and not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False


class _RecorderWithoutClock(Recorder):
    """A recorder where the time is measured elsewhere, since others use it too."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts no clock."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops none."""
