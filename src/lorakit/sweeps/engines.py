"""What trains a sweep's configurations: this process, in groups or one by one, or a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from lorakit.errors import InputError
from lorakit.sweeps.ground import Ground
from lorakit.sweeps.runner import Runner
from lorakit.sweeps.solo import SoloRunner
from lorakit.sweeps.space.settings import SweepSettings
from lorakit.sweeps.together.runner import TogetherRunner

Say = Callable[[str], None]


def require_engine(settings: SweepSettings) -> None:
    """Raises InputError where a library that an engine needs is not installed."""
    if settings.engine == "ray" and not find_spec("ray"):
        raise InputError("the engine ray needs ray: pip install 'lorakit[ray]'")


@contextmanager
def engine(settings: SweepSettings, ground: Ground, seed: int, say: Say) -> Iterator[Runner]:
    """The runner of a sweep, for as long as the block lasts."""
    if settings.engine != "ray":
        yield in_this_process(ground, say, together=settings.engine == "together")
        return
    from lorakit.sweeps.on_ray import RayRunner

    with RayRunner(ground.recipe, settings.selection, seed, settings.workers, say) as runner:
        yield runner


def in_this_process(ground: Ground, say: Say, *, together: bool = True) -> Runner:
    """Groups in shared batches where the task allows it."""
    if together and ground.begun.objective.name == "sft":
        return TogetherRunner(ground.begun, ground.held_out, say=say)
    if together:
        objective = ground.begun.objective
        what = objective.name if objective.task_type == "CAUSAL_LM" else objective.task_type
        say(f"configurations of {what} are trained one after the other")
    return SoloRunner(ground, say)
