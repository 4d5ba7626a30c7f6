"""One sweep, from a recipe and what to vary to a table, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorakit.console import open_console
from lorakit.data.sources import rows_from_python
from lorakit.errors import InputError, LorakitError, one_line
from lorakit.folder_lock import locked_folder
from lorakit.progress import showing
from lorakit.report.sweep_page import write_sweep_page
from lorakit.sweeps.criterion import Criterion, check_objective
from lorakit.sweeps.leaderboard import leaderboard, read_leaderboard, standings, write_leaderboard
from lorakit.sweeps.local import LocalRunner, require_sweepable
from lorakit.sweeps.ranks import rank_choice
from lorakit.sweeps.search import Runner, Search, rungs
from lorakit.sweeps.space.configurations import Configuration, check_keys, configurations
from lorakit.sweeps.space.samplers import Changes, sampler_of
from lorakit.sweeps.space.sweep_settings import SweepSettings, load_sweep
from lorakit.sweeps.splits import SELECTION
from lorakit.sweeps.sweep_base import SweepBase, load_base
from lorakit.sweeps.sweep_folder import (
    check_disk,
    check_folder,
    claim_folder,
    clean_up,
    publish,
    require_same,
    write_recipe,
)
from lorakit.training.recipe import Recipe
from lorakit.training.run import named_failures
from lorakit.training.setup import training_arguments

Say = Callable[[str], None]

FEW = 50  # prompts of a split: with fewer, there is a warning with the interval of the base's loss


def sweep(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *overrides: str,
    over: Mapping[str, Any] | Iterable[str] = (),
    data: Any = None,
    resume: bool = False,
    quiet: bool = False,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Trains many configurations of one adapter on one base, and says which is the best.

    Args:
        recipe: a recipe's file, or its keys as a mapping; its `sweep` block is what is not given
            here, and its `output_dir` the folder of all.
        overrides: `dotted.key=value`, as on the command line.
        over: recipe keys with the values that each takes (`{"lora.r": [4, 8]}`), or with a range
            (`{"training.learning_rate": {"low": 1e-5, "high": 1e-3}}`).
        data: rows in place of the recipe's `data.train`, as in `lorakit.train`.
        resume: resume the sweep in `output_dir`, when there is one.
        quiet: show nothing.
        settings: the other fields of `SweepSettings`, such as `sampler`, `trials`, `prune`,
            `objective`.

    Returns: a record of each configuration, the best first, as in `leaderboard.json`.

    Raises:
        InputError: the recipe, what is swept, the data or the folder cannot be used.
        StoppedError: Ctrl-C or SIGTERM; what was trained is saved.
        LorakitError: training failed, or no configuration came to its end.
    """
    console = open_console(stderr=True, quiet=quiet, soft_wrap=True)

    def say(line: str) -> None:
        console.print(one_line(line))

    changes: list[str | tuple[str, Any]] = list(overrides)
    with ExitStack() as held:
        if data is not None:
            changes += held.enter_context(rows_from_python(data)).items()
        complete, wishes = load_sweep(recipe, changes, over, settings)
        if data is not None and wishes.engine == "ray":
            raise InputError("the engine ray reads rows from files only: write the data to one")
        held.enter_context(showing(console))
        table = run_sweep(complete, wishes, resume=resume, say=say)
    return list(table["configurations"])


def run_sweep(recipe: Recipe, settings: SweepSettings, *, resume: bool, say: Say) -> dict[str, Any]:
    """As `sweep`, with what `load_sweep` has read; returns all of the leaderboard."""
    folder = Path(recipe.output_dir)
    seed = recipe.training.seed if settings.seed is None else settings.seed
    if settings.engine == "ray" and not find_spec("ray"):
        raise InputError("the engine ray needs ray: pip install 'lorakit[ray]'")
    check_keys(recipe, list(settings.over))
    sampler = sampler_of(settings, seed)
    draws = sampler.draw([], [])
    require_sweepable(recipe)
    for one in configurations(recipe, draws, lambda changed: changed):  # before a model is loaded
        require_sweepable(one.recipe)
    with ExitStack() as held:
        held.enter_context(locked_folder(folder, partial(check_folder, folder, resume=resume), say))
        require_same(folder, recipe, settings)
        if table := read_leaderboard(folder):
            say(f"{folder} is finished already: nothing is left to do")
            clean_up(folder)
            return table
        base = load_base(recipe, settings.selection, seed)
        check_objective(settings.objective, base)
        criterion = Criterion(settings.objective, base)

        def make(draws: Sequence[Changes], taken: Sequence[Configuration]) -> list[Configuration]:
            return configurations(recipe, draws, base.complete, taken)

        total = settings.trials or len(draws)
        first = make(draws, [])
        _check_each(first, base)
        check_disk(folder, first, base.trained_parameters, total)
        claim_folder(folder, recipe, settings, base.ground)
        shares = rungs(total, settings.reduction_factor) if settings.prune else [1.0]
        for line in _description(base, total, shares):
            say(line)
        held.enter_context(named_failures(folder))
        notices = [*_few_prompts(base), *_one_yardstick(settings.over, base)]
        for line in notices:
            say(line)
        with _runner(settings, base, say) as runner:
            factor, cost, shown = settings.reduction_factor, criterion.cost, criterion.shown
            search = Search(sampler, make, runner, shares, factor, say, cost, shown)
            records = search.run()
        finished = [record for record in records if record.finished]
        if not any(record.diverged is None for record in finished):
            raise LorakitError(
                "every configuration diverged: lower the learning rates, or max_grad_norm"
            )
        for record in records:
            for line in publish(record, base):
                say(line)
        for record in finished:
            criterion.prepare(record)
        found = standings(records, criterion)
        winner = found[0].record
        ranks = rank_choice(winner, base, say)
        notices = [*base.notices, *notices]
        table = leaderboard(found, criterion, settings, ranks, notices)
        write_recipe(folder, winner.configuration)
        write_sweep_page(folder, table, {record.name: record.train_losses for record in records})
        write_leaderboard(folder, table)
        clean_up(folder)
    return table


def _runner(settings: SweepSettings, base: SweepBase, say: Say) -> AbstractContextManager[Runner]:
    """What trains the configurations, for as long as a block lasts."""
    if settings.engine != "ray":
        return nullcontext(LocalRunner(base, together=settings.engine == "together", say=say))
    from lorakit.sweeps.on_ray import RayRunner

    return RayRunner(base.recipe, settings.selection, base.seed, settings.workers, say)


def _check_each(configurations: Sequence[Configuration], base: SweepBase) -> None:
    """Raises InputError for what only transformers, or the base model, finds wrong."""
    for configuration in configurations:
        try:
            training_arguments(configuration.recipe, held_out=False)
            base.trained_parameters(configuration.recipe)
            base.inputs_for(configuration.recipe)
        except InputError as error:
            raise InputError(f"{configuration.name}: {error}") from error


def _description(base: SweepBase, total: int, shares: Sequence[float]) -> Iterable[str]:
    parts = base.splits.values()
    chosen, reported = (f"{len(part.rows)} ({part.prompts} prompts)" for part in parts)
    yield (
        f"{total} configurations on {base.recipe.model}, {len(base.inputs.data.train)} rows to "
        f"learn from; held out are {chosen} to choose by and {reported} to report on"
    )
    yield from base.notices
    if len(shares) > 1:
        listed = ", ".join(f"{share:.0%}" for share in shares[:-1])
        yield f"losers are stopped after {listed} of their steps"


def _one_yardstick(over: Iterable[str], base: SweepBase) -> list[str]:
    """A notice where settings of the objective are swept, and so what the loss is."""
    if not any(key.partition(".")[0] == "objective" for key in over):
        return []
    settings = base.inputs.objective.settings
    swept = [key.partition(".")[2] for key in over if key.startswith("objective.")]
    own = ", ".join(f"{name}={getattr(settings, name)}" for name in swept)
    return [
        "losses and scores of all configurations are taken with the objective of the recipe"
        f"{f' ({own})' if own else ''}, so that they can be compared; the record of each has those "
        "of its own"
    ]


def _few_prompts(base: SweepBase) -> list[str]:
    """A warning where settings will be hard to tell apart."""
    interval = base.interval(base.bare_losses, SELECTION)
    fewest = min(part.prompts for part in base.splits.values())
    if fewest >= FEW:
        return []
    return [
        f"only {fewest} prompts to choose by or to report on: there the base's loss is "
        f"{interval.mean:.3f} ± {interval.half:.3f}, and settings that differ by little may not "
        "be told apart; hold out more rows (data.eval)"
    ]
