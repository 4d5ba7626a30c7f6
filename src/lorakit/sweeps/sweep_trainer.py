"""The trainer of one configuration: `lorakit train`'s, up to a step, alone or in shared passes.

Alone it trains by `train`. In a group it gives its next batch, the group computes its gradients in
a pass with those of others, and it does what Trainer does after the backward pass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from lorakit.adapters.manifest import METRICS_NAME
from lorakit.engine.shared_pass import AdapterBatch
from lorakit.errors import LorakitError
from lorakit.lora.streams import Stream
from lorakit.objectives.batch_sums import with_sums
from lorakit.objectives.forward import BASE, Forward
from lorakit.objectives.objective import Batch
from lorakit.objectives.rollout import REFERENCE, AskedPrompt, Rollout
from lorakit.progress import innermost
from lorakit.sweeps.held_out_rows import HeldOut
from lorakit.sweeps.records import Progress
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.sweep_base import SweepBase
from lorakit.training.batching import BatchDataset
from lorakit.training.checkpoints import newest_whole, step_of
from lorakit.training.differences import run_identity
from lorakit.training.early_stopping import EarlyStopping, SaveAfterEvaluation, stopped_before
from lorakit.training.interrupt import Interrupt
from lorakit.training.output import changes_since, claim_output, require_unchanged
from lorakit.training.position import planned_steps
from lorakit.training.recorder import Recorder, StepLines
from lorakit.training.setup import Setup
from lorakit.training.trainer import LoraTrainer, enable_checkpointing
from lorakit.training.watch import warn_of_unchanged


class DivergedError(LorakitError):
    """A configuration's loss, gradient or weight is NaN or Inf; the others are not affected."""


@dataclass(frozen=True)
class _OptimizerStep:
    """Batches of a step, what their summed loss is divided by, and the epoch after it.

    `unread` is what the sums that they still lack are made of, batch by batch.
    """

    batches: list[dict[str, torch.Tensor]]
    divisor: torch.Tensor
    epoch: float
    unread: list[Batch]


class SweepTrainer(LoraTrainer):
    """Trains one configuration up to a share of its run, in the configuration's folder.

    Args:
        setup: its run; the model is one of its own, or an `AdapterView` of a shared one.
        to: the share of its planned steps after which it stops, with a checkpoint.
        interrupt: the wish to stop, which all configurations share.

    Attributes:
        asked: the prompts that its adapter is to answer before its next step.
        planned, target: the optimizer steps of the whole run, and those that it is trained to.
        diverged: what was NaN or Inf, or None.

    Raises:
        InputError: the folder is another run's.
    """

    _steps: Generator[_OptimizerStep | Sequence[AskedPrompt], Sequence[Rollout] | None]
    _norm: Any  # of the gradient of the last step, and its learning rate
    _rate: Any

    def __init__(
        self,
        base: SweepBase,
        configuration: Configuration,
        setup: Setup,
        to: float,
        interrupt: Interrupt,
    ) -> None:
        self.configuration, self.setup, recipe = configuration, setup, configuration.recipe
        self.folder, args = Path(recipe.output_dir), setup.arguments
        batches = setup.batching.train_batches(setup.data.train, args, epoch=0)
        self.planned = planned_steps(args, len(batches))
        # As a share of a whole number of steps may come out a little above it.
        self.target = max(1, math.ceil(to * self.planned - 1e-9))
        self.folder.mkdir(parents=True, exist_ok=True)
        start = setup.inputs.start
        teacher = setup.inputs.teacher
        now = run_identity(
            recipe.to_dict(),
            base.facts,
            base=setup.base_fingerprint,
            parent=start.record.sha256 if start else None,
            teacher=teacher.sha256 if teacher else None,
        )
        require_unchanged(changes_since(self.folder, now), self.folder)
        claim_output(self.folder, now)
        last = newest_whole(self.folder, at_most=self.target)
        for line in last.damaged:
            interrupt.say(f"{self.folder.name}: {line}")
        self.checkpoint = last.checkpoint or newest_whole(self.folder).checkpoint
        super().__init__(
            setup.model,
            args,
            setup.data.train,
            setup.data.eval,
            setup.batching,
            setup.inputs.objective,
            recipe.training.loraplus_lr_ratio,
            tokenizer=setup.tokenizer,
        )
        self.stream = Stream(base.device)  # as Trainer has seeded it just now
        self.interrupt, self.templates = interrupt, setup.inputs.templates
        self.own_tokenizer = setup.tokenizer if setup.inputs.own_tokenizer else None
        self.stands_on = setup.inputs.start.frozen if setup.inputs.start else ()
        self.lines = StepLines(self.folder / METRICS_NAME)
        self.diverged: str | None = None
        self._step: _OptimizerStep | None = None
        self.asked: Sequence[AskedPrompt] = ()
        self._losses: list[torch.Tensor] = []
        self._in_group = False
        self.remove_callback(PrinterCallback)
        shown = self.objective.logged or self.objective.score_names
        self.add_callback(Recorder(self.lines, self.counts, shown))
        if patience := recipe.early_stopping_patience:
            self.add_callback(EarlyStopping(patience))
        for callback in (_StopAt(self.target), interrupt, SaveAfterEvaluation()):
            self.add_callback(callback)

    @property
    def is_done(self) -> bool:
        """Whether its checkpoint is as far as it is to be trained."""
        if self.checkpoint is None:
            return False
        patience = self.configuration.recipe.early_stopping_patience
        early = patience and stopped_before(self.checkpoint, self.args, patience)
        return step_of(self.checkpoint) >= self.target or bool(early)

    def train_alone(self) -> None:
        """Trains by itself, or takes up what is there already."""
        if self._taken_up():
            return
        try:
            with self.setup.fast():
                self.train(resume_from_checkpoint=self.checkpoint and str(self.checkpoint))
        except DivergedError as error:
            self.diverged = str(error)

    def finish(self, found: HeldOut | None) -> Progress:
        """How far it has come, with what held-out rows gave; a whole run's adapter is written."""
        state = self.state
        losses = found.losses if found else {}
        for split, rows in losses.items():
            if self.diverged is None and not all(math.isfinite(nats) for nats, _ in rows):
                where = f"at step {state.global_step}"
                self.diverged = f"the loss of the {split} rows is NaN or Inf {where}"
        if self.diverged is None and self.target == self.planned:
            self.save_adapter(self.folder)
            if self.start is not None:
                list(warn_of_unchanged(self.start, self.model, state.global_step, self.lines))
        progress = Progress(
            step=state.global_step,
            planned=self.planned,
            losses={},
            diverged=self.diverged,
            train_losses=[(e["step"], e["loss"]) for e in state.log_history if "loss" in e],
            seconds=self.counts.seconds,
        )
        if self.diverged or found is None:
            return progress
        return replace(progress, losses=losses, metrics=found.metrics, scores=found.scores)

    def _taken_up(self) -> bool:
        """Whether there is nothing to train; then the state is that of the checkpoint."""
        if self.is_done:
            assert self.checkpoint is not None
            self.take_up(self.checkpoint)
        return self.is_done

    # --- in a group ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Gets ready for the first step, or takes up what is there already."""
        self._in_group = True
        with self.stream.drawing():
            if not self._taken_up():
                self._steps = self._optimizer_steps()
                self._go_on()

    def _go_on(self, rollouts: Sequence[Rollout] | None = None) -> None:
        """To what comes next: prompts that are to be answered, a step, or the end."""
        self._step, self.asked = None, ()
        try:
            found = self._steps.send(rollouts)
        except StopIteration:
            return
        if isinstance(found, _OptimizerStep):
            self._step = found
        else:
            self.asked = found

    @property
    def adapter(self) -> str:
        """Its adapter's name in the group."""
        return str(self.setup.model.active_adapter)

    def take_rollouts(self, rollouts: Sequence[Rollout], seconds: float) -> None:
        """Goes on with the answers to `asked`.

        Args:
            seconds: its share of the time that they took.
        """
        self.counts.sampling_seconds += seconds
        with self.stream.drawing():
            self._go_on(rollouts)

    @property
    def read_reference(self) -> list[AdapterBatch]:
        """What the next step needs the losses of under the bare base (`take_reference`)."""
        if self._step is None or not self.objective.reads_reference:
            return []
        return [AdapterBatch(BASE, b) for b in self._step.batches if REFERENCE not in b]

    def take_reference(self, losses: Sequence[torch.Tensor]) -> None:
        """Puts the token losses of `read_reference` into the batches of the next step."""
        assert self._step is not None
        lacking = [batch for batch in self._step.batches if REFERENCE not in batch]
        for batch, own in zip(lacking, losses, strict=True):
            batch[REFERENCE] = -own

    def with_all_sums(
        self, batches: Sequence[dict[str, torch.Tensor]]
    ) -> list[dict[str, torch.Tensor]]:
        """LoraTrainer's; in a group those that can be made in a shared pass come later."""
        return [*batches] if self._unread(batches) else super().with_all_sums(batches)

    def _unread(self, batches: Sequence[dict[str, torch.Tensor]]) -> list[Batch]:
        if not (self._in_group and self.objective.needs_all_batches):
            return []
        read = [self.objective.read_beforehand(batch) for batch in batches]
        return [batch for batch in read if batch is not None]

    @property
    def read_beforehand(self) -> list[AdapterBatch]:
        """What the next step needs the losses of before its first batch (`take_beforehand`)."""
        unread = self._step.unread if self._step is not None else []
        return [AdapterBatch(self.adapter, batch) for batch in unread]

    def take_beforehand(self, losses: Sequence[torch.Tensor]) -> None:
        """Makes the sums that the next step lacks of the token losses of `read_beforehand`."""
        assert self._step is not None
        step, known = self._step, iter(zip(self._step.unread, losses, strict=True))

        def measure(forward: Forward, batch: Batch) -> Mapping[str, torch.Tensor]:
            return self.objective.beforehand(forward.given(*next(known)), batch)

        sums = self._measured(measure, step.batches)
        summed = [with_sums(batch, sums) for batch in step.batches]
        self._step = replace(step, batches=summed, unread=[])

    @property
    def next_batch(self) -> AdapterBatch | None:
        """The next batch; None where it has come as far as it goes."""
        if self._step is None:
            return None
        batch = self._step.batches[len(self._losses)]
        return AdapterBatch(
            self.adapter,
            batch,
            self._step.divisor,
            self.stream,
            self.args.label_smoothing_factor,
            partial(self._loss_of, batch),
            entropies=self.objective.reads_entropies,
        )

    def _loss_of(
        self,
        batch: Batch,
        token_losses: torch.Tensor,
        entropies: torch.Tensor | None = None,
        *,
        trial: bool = False,
    ) -> torch.Tensor:
        """The summed loss of a batch by the configuration's own settings.

        Args:
            token_losses: of its supervised tokens (n,), out of a pass with other adapters' rows.
            entropies: (n,), where the objective reads them.
        """
        forward = self.forward.given(batch, token_losses, entropies=entropies)
        loss = self.objective.loss(forward, batch)
        if not trial:
            self.take_metrics(loss)
        return loss.total

    def _measured(self, *args: Any) -> dict[str, torch.Tensor]:
        in_force = getattr(self.setup.model, "in_force", nullcontext)  # an `AdapterView`'s
        with in_force():
            return super()._measured(*args)

    def take(self, loss: torch.Tensor, seconds: float) -> None:
        """The gradients of the next batch are there: steps, if it was the last one of a step.

        Args:
            seconds: its share of the time of the pass.

        Raises:
            StoppedError: stopping was asked for; the step is saved.
        """
        assert self._step is not None
        self.counts.seconds += seconds
        self._losses.append(loss)
        if len(self._losses) < len(self._step.batches):
            return
        step, losses, self._step, self._losses = self._step, self._losses, None, []
        try:
            with self.stream.drawing():
                self._finish_step(step, losses)
                self._go_on()
        except DivergedError as error:
            self.diverged = str(error)

    def largest_batch(self) -> AdapterBatch:
        """The batch with most tokens of the first epoch, without dropout's stream, for trials."""
        rows, batching = self.setup.data.train, self.setup.batching
        batches = batching.train_batches(rows, self.args, epoch=0)
        largest = max(batches, key=lambda batch: sum(len(rows[i]) for i in batch))
        batch = self._prepare_inputs(BatchDataset(rows, batching, learning=True)[largest])
        supervised = max(1, sum(rows[i].supervised for i in largest))
        loss = partial(self._loss_of, batch, trial=True)
        return AdapterBatch(self.adapter, batch, supervised, loss=loss)

    def _optimizer_steps(
        self,
    ) -> Generator[_OptimizerStep | Sequence[AskedPrompt], Sequence[Rollout] | None]:
        """The steps from the checkpoint on, in Trainer's order and with its callbacks.

        The next one is asked for when `_finish_step` was called for the one before it. Before a
        step come the prompts that it learns answers to, if any, and their rollouts are sent.
        """
        args, resumed = self.args, str(self.checkpoint) if self.checkpoint else None
        self._began, self._resumed_from = time.time(), self.checkpoint
        enable_checkpointing(self.model, args)
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
            self._norm = self._rate = None
            self._tell("epoch_begin")
            done = skipped if epoch == first else 0
            restores = resumed is not None and epoch == first
            if restores and not done:
                self._load_rng_state(resumed)
            batches = iter(skip_first_batches(loader, done) if done else loader)
            while done < in_epoch and not self.control.should_training_stop:
                count = min(args.gradient_accumulation_steps, in_epoch - done)
                samples, divisor = yield from self._samples(batches, count)
                if restores and done:
                    self._load_rng_state(resumed)  # after what skipping has drawn
                restores = False
                done += len(samples)
                if callable(train := getattr(self.optimizer, "train", None)):
                    train()  # of a schedule-free optimizer, which evaluates with other weights
                inputs = [self._prepare_inputs(batch) for batch in samples]
                for batch in inputs:
                    self._track_num_input_tokens(batch)
                unread = self._unread(inputs)
                yield _OptimizerStep(inputs, divisor, epoch + done / in_epoch, unread)
            self._tell("epoch_end")
            self._log_and_save()
            if self.control.should_training_stop:
                break
        self._finalize_training(None, 0, self._began)
        self._averaged()

    def _samples(
        self, batches: Iterator[dict[str, torch.Tensor]], count: int
    ) -> Generator[
        Sequence[AskedPrompt],
        Sequence[Rollout] | None,
        tuple[list[dict[str, torch.Tensor]], torch.Tensor],
    ]:
        """`get_batch_samples`, where others write what is sampled."""
        if self.rollouts is None:
            return self.get_batch_samples(batches, count, self.args.device)
        before, taken = self.rollouts.tokens, list(islice(batches, count))
        asking: Any = self.rollouts.into(taken, self.state.global_step)
        made = yield from asking
        return self.counted(made, self.rollouts.tokens - before)

    def _finish_step(self, step: _OptimizerStep, losses: Sequence[torch.Tensor]) -> None:
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
        self._norm, self._rate = norm, self._get_learning_rate()
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
        epoch, model = self.state.epoch or 0, self.model
        self._maybe_log_save_evaluate(
            self._tr_loss, self._norm, model, None, epoch, None, self._began, self._rate
        )

    # --- NaN or Inf ---------------------------------------------------------------------------

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """LoraTrainer's. Raises DivergedError where it is NaN or Inf."""
        loss = super().compute_loss(*args, **kwargs)
        self._require_finite("loss", loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._require_finite("norm of the gradient", norm)
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """LoraTrainer's. Raises DivergedError for a weight that nobody could resume from."""
        if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            raise DivergedError(f"a weight is NaN or Inf at step {self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _require_finite(self, what: str, value: Any) -> None:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
        if not math.isfinite(number):
            raise DivergedError(f"the {what} is {number} at step {self.state.global_step + 1}")


class _StopAt(TrainerCallback):
    """Stops with a checkpoint after a step; comes before what puts saving off."""

    def __init__(self, target: int) -> None:
        self.target = target

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._share = 1 / max(1, self.target - state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        innermost().advance(self._share)
        if state.global_step >= self.target:
            control.should_training_stop = control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In the middle of an epoch nothing is due."""
        if control.should_training_stop and not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False
