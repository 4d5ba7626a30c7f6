"""What peers are given so that a comparison is of the same training."""

from __future__ import annotations

from typing import Any

from lorakit.training.schedule import warm_from_first


def warmed(trainer: Any) -> Any:
    """A `transformers.Trainer` whose warm-up begins above 0, as lorakit's does: a step more that
    learns.
    """
    create = trainer.create_scheduler

    def create_scheduler(num_training_steps: int, optimizer: Any = None) -> Any:
        warmup = trainer.args.get_warmup_steps(num_training_steps)
        made = create(num_training_steps, optimizer)
        trainer.lr_scheduler = warm_from_first(made, warmup, num_training_steps)
        return trainer.lr_scheduler

    trainer.create_scheduler = create_scheduler
    return trainer
