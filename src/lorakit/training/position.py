"""Where a run stands in its rows, and how many optimiser steps it has, also when batches change.

A checkpoint's state has the epoch with its fraction. A run whose rows, batch size, accumulation or
processes change is resumed at the same share of its epoch; an unchanged one with the next batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

if TYPE_CHECKING:
    from transformers import TrainingArguments

_ROUNDING = 1e-6  # of a batch: an epoch's fraction is a float


@dataclass(frozen=True)
class Position:
    """A place in the epochs of a run.

    Args:
        epoch: the one that was begun, from 0.
        batches: of it that are done, of one process; a whole number of steps.
        ahead: how many more optimiser steps were made than lead to here with the batches as they
            are now, as batches were smaller then; negative for fewer.
    """

    epoch: int = 0
    batches: int = 0
    ahead: int = 0


def place_at(checkpoint: Path, args: TrainingArguments, batches: int) -> Position:
    """The place at which a checkpoint was written.

    Args:
        batches: of an epoch, all processes together.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    accumulation, done = args.gradient_accumulation_steps, state.epoch or 0.0
    epoch = math.floor(done)
    within = math.floor((done - epoch) * math.ceil(batches / args.world_size) + _ROUNDING)
    within -= within % accumulation
    before = epoch * steps_per_epoch(args, batches) + within // accumulation
    return Position(epoch, within, state.global_step - before)


def steps_per_epoch(args: TrainingArguments, batches: int) -> int:
    """Optimiser steps of an epoch; the last one may have fewer batches.

    Args:
        batches: of an epoch, all processes together.
    """
    own = math.ceil(batches / args.world_size)
    return max(1, math.ceil(own / args.gradient_accumulation_steps))


def planned_steps(args: TrainingArguments, batches: int, place: Position | None = None) -> int:
    """The number of a run's last optimiser step: `max_steps`, or the end of `num_train_epochs`.

    Args:
        batches: of an epoch, all processes together.
        place: from which the run is resumed.
    """
    if args.max_steps > 0:
        return args.max_steps
    epochs = math.ceil(args.num_train_epochs * steps_per_epoch(args, batches))
    return epochs + (place.ahead if place else 0)
