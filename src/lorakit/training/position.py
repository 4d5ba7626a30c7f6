"""Where a run stands in its rows, and how many optimiser steps it has, also when batches change.

The place in the rows is kept as epochs, of which a checkpoint's state has the number with its
fraction. So a run whose rows, batch size, accumulation or processes change goes on in the epoch
that it had begun, at the same share of it, and a run that does not change goes on with the very
batch that comes next.
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
        epoch: the epoch that goes on, from 0.
        batches: of it that are done, of one process; a whole number of steps.
        steps_before: the optimiser steps that lead to here with the batches as they are now.
        ahead: how many more were made, as batches were smaller then; negative for fewer.
    """

    epoch: int = 0
    batches: int = 0
    steps_before: int = 0
    ahead: int = 0


def position(state: TrainerState, batches: int, accumulation: int) -> Position:
    """The place at which a state was saved.

    Args:
        batches: of an epoch, of one process.
        accumulation: batches of an optimiser step.
    """
    done = state.epoch or 0.0
    epoch = math.floor(done)
    within = math.floor((done - epoch) * batches + _ROUNDING)
    within -= within % accumulation
    before = epoch * steps_per_epoch(batches, accumulation) + within // accumulation
    return Position(epoch, within, before, state.global_step - before)


def place_at(checkpoint: Path, args: TrainingArguments, batches: int) -> Position:
    """The place at which a checkpoint was written.

    Args:
        batches: of an epoch, all processes together.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    own = math.ceil(batches / args.world_size)
    return position(state, own, args.gradient_accumulation_steps)


def steps_per_epoch(batches: int, accumulation: int) -> int:
    """Optimiser steps of an epoch; the last one may have fewer batches."""
    return max(1, -(-batches // accumulation))


def planned_steps(args: TrainingArguments, batches: int, place: Position | None = None) -> int:
    """The number of a run's last optimiser step: `max_steps`, or the end of `num_train_epochs`.

    Args:
        batches: of an epoch, all processes together.
        place: from which the run goes on.
    """
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = steps_per_epoch(
        math.ceil(batches / args.world_size), args.gradient_accumulation_steps
    )
    return math.ceil(args.num_train_epochs * per_epoch) + (place.ahead if place else 0)
