"""Configurations spread over a Ray cluster: each worker has a base of its own, and trains groups.

A worker needs to see the same files as this process, the sweep's folder among them. Where a cluster
is named (`RAY_ADDRESS`) it is joined, else one is started on this machine.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from lorakit.errors import LorakitError
from lorakit.sweeps.local import LocalRunner
from lorakit.sweeps.records import Progress
from lorakit.sweeps.space.configurations import Configuration
from lorakit.sweeps.sweep_base import load_base
from lorakit.training.interrupt import StoppedError
from lorakit.training.recipe import Recipe


class RayRunner:
    """Spreads configurations over workers, and waits for all.

    Args:
        recipe, selection, seed: of the sweep, from which each worker loads its own base.
        workers: how many; None for one a GPU, or one a node where there are none.
    """

    def __init__(
        self,
        recipe: Recipe,
        selection: float,
        seed: int,
        workers: int | None,
        say: Callable[[str], None],
    ) -> None:
        import ray

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what its next release will do by itself
            ray.init(
                address=os.environ.get("RAY_ADDRESS"),
                ignore_reinit_error=True,
                log_to_driver=False,
                include_dashboard=False,
                logging_level="ERROR",
            )
        resources = ray.cluster_resources()
        gpus, nodes = int(resources.get("GPU", 0)), len(ray.nodes())
        count = workers or gpus or nodes
        share = max(1, int(resources.get("CPU", 1)) // count)
        options = {"num_gpus": min(1, gpus / count)} if gpus else {"num_cpus": share}
        say(f"{count} workers of Ray on {nodes} nodes, each with its own base")
        make = ray.remote(_Worker).options(**options)
        here = str(Path.cwd())
        self.workers: list[Any] = [make.remote(here, recipe, selection, seed) for _ in range(count)]
        self.say = say

    def advance(self, configurations: Sequence[Configuration], to: float) -> dict[str, Progress]:
        """Trains each to the share `to` of its own steps; see `search.Runner`.

        Raises:
            StoppedError: Ctrl-C; each worker has saved what it did.
            LorakitError: a worker was lost, or failed.
        """
        import ray

        # Dealt out in turns, so that each gets its share of the slow ones.
        count = len(self.workers)
        asked = [
            worker.advance.remote([*configurations[i::count]], to)
            for i, worker in enumerate(self.workers[: len(configurations)])
        ]
        found: dict[str, Progress] = {}
        try:
            for progress, lines in ray.get(asked):
                found |= progress
                for line in lines:
                    self.say(line)
        except KeyboardInterrupt as error:
            raise StoppedError("stopped: the same command with --resume resumes it") from error
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, LorakitError) else LorakitError(str(cause)) from error
        except ray.exceptions.RayError as error:
            raise LorakitError(
                f"a worker of Ray was lost ({str(error).splitlines()[0]}): the same command with "
                "--resume resumes it"
            ) from error
        return {c.name: found[c.name] for c in configurations}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Ends the workers, and the cluster if it was started here."""
        import ray

        ray.shutdown()


class _Worker:
    """A process somewhere in the cluster, with its own base and rows.

    Args:
        here: the folder that paths of the recipe are seen from.
    """

    def __init__(self, here: str, recipe: Recipe, selection: float, seed: int) -> None:
        os.chdir(here)
        self.lines: list[str] = []
        base = load_base(recipe, selection, seed)
        self.runner = LocalRunner(base, say=self.lines.append)

    def advance(
        self, configurations: Sequence[Configuration], to: float
    ) -> tuple[dict[str, Progress], list[str]]:
        """What the runner gives, and what it said."""
        progress = self.runner.advance(configurations, to)
        lines, self.lines[:] = list(self.lines), []
        return progress, lines
