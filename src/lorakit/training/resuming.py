"""Whether and how a run goes on from a checkpoint, decided before anything is written.

What the checkpoint is, is `checkpoints.py`'s to say, and which recipe keys may change
`continuing.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorakit.errors import InputError, listed
from lorakit.training.checkpoints import Found, read_seal
from lorakit.training.continuing import changes_batches, needs_steps, notices, refuse
from lorakit.training.differences import Difference
from lorakit.training.position import place_at, planned_steps
from lorakit.training.setup import Setup


def check_going_on(
    setup: Setup, found: Found, changes: Sequence[Difference], *, finished: bool
) -> list[str]:
    """What a user should know of how a run goes on.

    Args:
        found: what it goes on from.
        changes: since it was written.
        finished: the run had come to its end.

    Raises:
        InputError: it cannot go on from there, or not with these changes.
    """
    folder = Path(setup.recipe.output_dir)
    refuse(changes, setup.recipe.to_dict(), folder)
    if found.checkpoint is None:
        if found.damaged:
            raise InputError(
                f"none of the checkpoints in {folder} can be used: {listed(found.damaged, 4)}. "
                "Remove them to start anew with the same command, or give another folder"
            )
        if finished and changes:
            raise InputError(
                f"{folder} holds a finished run without a checkpoint (training.save_strategy=no): "
                "there is nothing to continue from; give another folder"
            )
        return []
    world = setup.arguments.world_size
    batches = len(setup.batching.train_batches(setup.data.train, setup.arguments, epoch=0))
    place = place_at(found.checkpoint, setup.arguments, batches)
    steps = planned_steps(setup.arguments, batches, place)
    cure = (
        "raise training.max_steps"
        if setup.arguments.max_steps > 0
        else ("raise training.num_train_epochs")
    )
    if found.step > steps:
        raise InputError(
            f"the run in {folder} stands at step {found.step}, behind its end at step {steps} as "
            f"the recipe is now: {cure}, or give another folder"
        )
    idle = needs_steps(change.key for change in changes)
    if found.step == steps and idle:
        raise InputError(
            f"the run in {folder} stands at its last step, {steps}, and no step is left in which "
            f"{listed(idle, 4)} would take effect: {cure}, or give another folder"
        )
    keys = [change.key for change in changes]
    said = notices(keys, setup.recipe.to_dict())
    if place.batches and changes_batches(keys):
        said.append(
            f"epoch {place.epoch + 1} goes on at {place.batches * world / batches:.0%} in other "
            "batches: where its rows are in another order now, some come twice or not at all in it"
        )
    return said


def not_taken_over(found: Found, *, accept_changes: bool) -> list[str]:
    """What a checkpoint lacks that an undisturbed run has; an error unless that is accepted."""
    if found.checkpoint is None or read_seal(found.checkpoint)["optimizer"] is not None:
        return []
    lacking = (
        f"{found.checkpoint.name} was saved without the state of optimiser and random numbers "
        "(training.save_only_model)"
    )
    if not accept_changes:
        raise InputError(
            f"{lacking}: --resume cannot go on to what an undisturbed run gives; --continue goes "
            "on with new moments, at the same step of the schedule"
        )
    return [lacking]
