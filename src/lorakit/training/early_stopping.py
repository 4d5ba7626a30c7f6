"""Stopping when the held-out rows no longer gain, in the same place when resumed; and what is saved
behind an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME


class EarlyStopping(TrainerCallback):
    """Stops a run behind `patience` evaluations in a row without a new best.

    transformers' own callback counts from 0 again in a resumed run; this one counts the
    evaluations that the state remembers.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if evaluations_in_vain(args, state) >= self.patience:
            control.should_training_stop = True


def evaluations_in_vain(args: TrainingArguments, state: TrainerState) -> int:
    """The evaluations since the best one, by the run's metric for the best model."""
    name = str(args.metric_for_best_model)
    name = name if name.startswith("eval_") else f"eval_{name}"
    sign = 1 if args.greater_is_better else -1
    values = [sign * entry[name] for entry in state.log_history if name in entry]
    return len(values) - 1 - values.index(max(values)) if values else 0


def stopped_before(checkpoint: Path, args: TrainingArguments, patience: int) -> bool:
    """Whether the run had ended early when `checkpoint` was written."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return evaluations_in_vain(args, state) >= patience


class SaveAfterEvaluation(TrainerCallback):
    """Saves the last step of an epoch when the epoch has been evaluated, as other steps are.

    Trainer would save first: a run killed in between would be resumed without that evaluation.
    Comes behind all callbacks that ask for saving.
    """

    _postponed = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts saving off until the epoch's end, which is next."""
        ends = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        self._postponed = control.should_save and ends
        if self._postponed:
            control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self._postponed
        self._postponed = False
