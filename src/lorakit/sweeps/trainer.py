"""The trainer of one configuration: `lorakit train`'s, up to a step, alone or in shared passes.

Alone it trains by `train`. In a group its steps are driven from outside: `optimizer_steps` gives
the batches of each step, whoever drives computes their gradients in passes with other adapters,
and `finish_step` does what Trainer does behind them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import skip_first_batches
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from lorakit.adapters.manifest import METRICS_NAME
from lorakit.errors import LorakitError
from lorakit.lora.model import LoraModel
from lorakit.lora.routing import Route
from lorakit.lora.saving import save_adapter, write_card
from lorakit.progress import innermost
from lorakit.training.early_stopping import EarlyStopping, SaveAfterEvaluation
from lorakit.training.interrupt import Interrupt
from lorakit.training.recorder import Recorder, StepLines
from lorakit.training.setup import Setup
from lorakit.training.trainer import LoraTrainer, enable_checkpointing


class DivergedError(LorakitError):
    """A configuration's loss, gradient or weight is NaN or Inf; others are none the worse."""


@dataclass(frozen=True)
class OptimizerStep:
    """What an optimizer step learns from.

    Attributes:
        batches: tensors on the device, one of each accumulation step.
        divisor: what the summed loss of all is divided by.
        epoch: where the run stands behind it, with its fraction.
    """

    batches: list[dict[str, torch.Tensor]]
    divisor: torch.Tensor
    epoch: float


class SweepTrainer(LoraTrainer):
    """Trains one configuration up to some step of its whole run.

    Args:
        setup: the run; its model is one of its own, or an `AdapterView` of a shared one.
        target: the optimizer step behind which it stops, with a checkpoint.
        interrupt: the wish to stop, which all configurations share.
    """

    def __init__(self, setup: Setup, target: int, interrupt: Interrupt) -> None:
        super().__init__(
            setup.model,
            setup.arguments,
            setup.data.train,
            setup.data.eval,
            setup.batching,
            setup.inputs.objective,
            setup.recipe.training.loraplus_lr_ratio,
        )
        self.interrupt, self.templates = interrupt, setup.inputs.templates
        self.lines = StepLines(Path(setup.recipe.output_dir) / METRICS_NAME)
        self.remove_callback(PrinterCallback)
        looking: list[TrainerCallback] = [Recorder(self.lines, self.counts)]
        if patience := setup.recipe.early_stopping_patience:
            looking.append(EarlyStopping(patience))
        for callback in (*looking, _StopAt(target), interrupt, SaveAfterEvaluation()):
            self.add_callback(callback)

    # --- steps that are driven from outside ---------------------------------------------------

    def optimizer_steps(self, checkpoint: Path | None) -> Iterator[OptimizerStep]:
        """The steps of the run from `checkpoint` on, in Trainer's order and with its callbacks.

        The next one is asked for when `finish_step` was called for the one before it.
        """
        args, resumed = self.args, str(checkpoint) if checkpoint else None
        self._began = time.time()
        enable_checkpointing(self.model, args)
        self._resumed_from = checkpoint
        if resumed:
            self._load_from_checkpoint(resumed)
        loader = self.get_train_dataloader()
        epochs, per_epoch, _, _, _, in_epoch, steps = self.set_initial_training_values(args, loader)
        first, skipped = self._init_training_state(steps, per_epoch, epochs, resumed, None)
        _, loader = self._prepare_for_training(steps, loader, resumed)
        self._initial_global_step = self._globalstep_last_logged = self.state.global_step
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        self._tr_loss, self._total_loss_scalar = torch.tensor(0.0, device=args.device), 0.0
        self.model.zero_grad()
        self._tell("train_begin")
        for epoch in range(first, epochs):
            self._behind: tuple[Any, float | None] = None, None  # gradient's norm, learning rate
            self._tell("epoch_begin")
            done = skipped if epoch == first else 0
            restores = resumed is not None and epoch == first
            if restores and not done:
                self._load_rng_state(resumed)
            batches = iter(skip_first_batches(loader, done) if done else loader)
            while done < in_epoch and not self.control.should_training_stop:
                count = min(args.gradient_accumulation_steps, in_epoch - done)
                samples, divisor = self.get_batch_samples(batches, count, args.device)
                if restores and done:
                    self._load_rng_state(resumed)  # behind what skipping has drawn
                restores = False
                done += len(samples)
                if callable(train := getattr(self.optimizer, "train", None)):
                    train()  # of a schedule-free optimizer, which evaluates with other weights
                inputs = [self._prepare_inputs(batch) for batch in samples]
                for batch in inputs:
                    self._track_num_input_tokens(batch)
                yield OptimizerStep(inputs, divisor, epoch + done / in_epoch)
            self._tell("epoch_end")
            self._log_and_save()
            if self.control.should_training_stop:
                break
        self._finalize_training(None, 0, self._began)
        self._averaged()

    def finish_step(self, step: OptimizerStep, losses: Sequence[torch.Tensor]) -> None:
        """Updates the weights from gradients that are there, then logs, evaluates and saves.

        Args:
            losses: of the step's batches, each divided by its divisor.

        Raises:
            DivergedError: a loss or the gradient is NaN or Inf.
            StoppedError: stopping was asked for; the step is saved.
        """
        for loss in losses:
            self._require_finite("loss", loss)
            self._tr_loss += loss
        self.accelerator.gradient_state._set_sync_gradients(True)  # one for all trainers
        self._tell("step_begin")
        clipped = self._clip_grad_norm(self.model) if self.args.max_grad_norm > 0 else None
        norm = self._get_grad_norm(self.model, clipped)
        self._tell("pre_optimizer_step")
        self.optimizer.step()
        self._tell("optimizer_step")
        self._behind = norm, self._get_learning_rate()
        self.lr_scheduler.step()
        self.model.zero_grad()
        self.state.global_step += 1
        self.state.epoch = step.epoch
        self._tell("step_end")
        self._log_and_save()

    def _tell(self, event: str) -> None:
        tell = getattr(self.callback_handler, f"on_{event}")
        self.control = tell(self.args, self.state, self.control)

    def _log_and_save(self) -> None:
        norm, rate = self._behind
        self._maybe_log_save_evaluate(
            self._tr_loss, norm, self.model, None, self.state.epoch or 0, None, self._began, rate
        )

    # --- what is NaN or Inf -------------------------------------------------------------------

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """LoraTrainer's.

        Raises:
            DivergedError: it is NaN or Inf.
        """
        loss = super().compute_loss(*args, **kwargs)
        self._require_finite("loss", loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._require_finite("norm of the gradient", norm)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """LoraTrainer's; broken weights are not kept, as nobody could resume from them.

        Raises:
            DivergedError: a weight is NaN or Inf.
        """
        if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            raise DivergedError(f"a weight is NaN or Inf at step {self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _require_finite(self, what: str, value: Any) -> None:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
        if not math.isfinite(number):
            raise DivergedError(f"the {what} is {number} at step {self.state.global_step + 1}")


class _StopAt(TrainerCallback):
    """Stops with a checkpoint behind a step; comes before what puts saving off."""

    def __init__(self, target: int) -> None:
        self.target = target

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts from the step that training is resumed from."""
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


class AdapterView(nn.Module):
    """The parameters of one adapter, under the names and in the order that they have alone.

    It is a Trainer's model where several are trained on one base: an optimizer over it, its groups
    and its state in a checkpoint are those of a run that trains this adapter by itself.

    Args:
        whole: the model with all adapters.
        name: the adapter.
    """

    whole: LoraModel

    def __init__(self, whole: LoraModel, name: str) -> None:
        super().__init__()
        object.__setattr__(self, "whole", whole)  # no submodule: its parameters are not ours
        self.active_adapter = name
        own = {id(tensor) for tensor in whole.adapter_tensors(name).values()}
        for path, parameter in whole.named_parameters():
            if id(parameter) in own:
                *parents, last = ("default" if p == name else p for p in path.split("."))
                place: nn.Module = self
                for parent in parents:
                    if parent not in place._modules:
                        place.add_module(parent, nn.Module())
                    place = place._modules[parent]  # type: ignore[assignment]
                place.register_parameter(last, parameter)

    def get_base_model(self) -> nn.Module:
        """The base model, with all adapters beside its layers."""
        return self.whole.get_base_model()

    def train(self, mode: bool = True) -> Self:
        """Of the whole model."""
        self.whole.train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, with this adapter for every row."""
        with self.whole.routing.using(Route(shared=(self.active_adapter,))):
            return self.whole(*args, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """The whole model's: every adapter's trainer asks it for the same."""
        kwargs = gradient_checkpointing_kwargs
        self.whole.gradient_checkpointing_enable(None if kwargs is None else {**kwargs}, **options)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True) -> None:
        """Writes this adapter alone, as `LoraModel.save_pretrained` writes an only one."""
        folder = Path(save_directory)
        save_adapter(self.whole, folder, self.active_adapter, write=is_main_process)
        if is_main_process:
            write_card(folder, self.get_base_model())
