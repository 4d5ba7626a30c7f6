"""One training run, from a recipe to an adapter's folder, in the order in which it happens."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from lorakit.adapters.manifest import (
    COMPLETIONS_NAME,
    METRICS_NAME,
    MONITOR_NAME,
    Manifest,
    read_manifest,
    write_manifest,
)
from lorakit.console import open_console
from lorakit.data.sources import rows_from_python
from lorakit.data.template_clock import Rendering
from lorakit.errors import LorakitError, one_line
from lorakit.folder_lock import locked_folder, require_unlocked
from lorakit.lora.routing import Route
from lorakit.models.loss import SupervisedLoss
from lorakit.models.template_files import write_templates
from lorakit.objectives.forward import bare
from lorakit.objectives.objective import Objective
from lorakit.objectives.registry import registered
from lorakit.progress import showing
from lorakit.report.run_page import write_report
from lorakit.training.checkpoints import Found, newest_whole
from lorakit.training.continuing import changes_evaluation, check_resume, missing_state
from lorakit.training.early_stopping import EarlyStopping, SaveAfterEvaluation, stopped_before
from lorakit.training.forecast import forecast
from lorakit.training.interrupt import Interrupt
from lorakit.training.kept_pictures import pictures_kept
from lorakit.training.machine import LESS_MEMORY, is_main_process, memory_mb
from lorakit.training.output import (
    changed_since,
    changes_since,
    check_output,
    claim_output,
    rendering_of,
    require_data,
    require_environment,
    require_rewards,
    require_unchanged,
    same_run,
)
from lorakit.training.position import planned_steps
from lorakit.training.processes import join, require_same_view
from lorakit.training.recipe import Recipe, load_recipe, named_objective
from lorakit.training.recorder import ProgressBar, Recorder, StepLines
from lorakit.training.run_record import (
    HeldOutScores,
    manifest_of,
    write_held_out_rewards,
    write_samples,
)
from lorakit.training.setup import Setup, set_up
from lorakit.training.trainer import LoraTrainer
from lorakit.training.watch import Watch, warn_of_unchanged

FORECAST_FROM = 200
"""Optimiser steps of a run that is worth the few that a forecast takes."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the adapter's folder, and the record beside it."""

    output_dir: Path
    manifest: Manifest

    @property
    def eval_loss(self) -> float | None:
        """Nats per supervised token on the held-out rows, None when none were held out."""
        return self.manifest.eval_loss


def train(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *overrides: str,
    data: Any = None,
    objective: Objective | str | Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
    accept_changes: bool = False,
    expected_data: list[dict[str, Any]] | None = None,
    expected_rewards: list[dict[str, Any]] | None = None,
    expected_environment: Mapping[str, str] | None = None,
    rendering: Rendering | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Trains an adapter as `recipe` says and leaves it in `output_dir`.

    Args:
        recipe: a recipe's file, or its keys as a mapping.
        overrides: `dotted.key=value`, as on the command line.
        data: rows in place of the recipe's `data.train`: a list of dicts, a `datasets.Dataset`,
            or a mapping with such under `train` and `eval`. To resume, give the same ones again.
        objective: what is learned, in place of the recipe's `objective`: its name, `type` and
            settings, or an instance of a subclass of `objectives.objective.Objective`.
        callbacks: transformers' callbacks, beside lorakit's own.
        resume: resume from the last checkpoint in `output_dir`, when there is one.
        accept_changes: with `resume`, resume although recipe or data are not those of the run so
            far; what changed is recorded.
        expected_data, expected_rewards, expected_environment: what the data and the files of
            rewards, environment and tools must be, as `Manifest` has them.
        rendering: how rows are to become text; None is as the tokenizer has it, now.
        quiet: show nothing.

    Raises:
        InputError: the recipe, the data or the folder cannot be used; nothing is written then.
        StoppedError: Ctrl-C or SIGTERM; the step was finished and saved.
        LorakitError: training failed (a full disk, a loss that is NaN or Inf).
    """
    with ExitStack() as held:
        changes: list[str | tuple[str, Any]] = list(overrides)
        if data is not None:
            changes += held.enter_context(rows_from_python(data)).items()
        if isinstance(objective, Mapping):  # whose settings may be functions
            objective = named_objective(objective)
        own = objective if isinstance(objective, Objective) else None
        if objective is not None:
            changes.append(("objective", registered(own).to_dict() if own else objective))
        if not isinstance(recipe, Recipe):
            recipe = load_recipe(recipe, changes)
        elif changes:
            recipe = load_recipe(recipe.to_dict(), changes)
        given = recipe.training.model_extra or {}
        join(given.get("ddp_backend"), given.get("ddp_timeout", 1800))
        main = is_main_process()
        console = open_console(stderr=True, quiet=quiet or not main, soft_wrap=True)
        folder = Path(recipe.output_dir)
        held.enter_context(showing(console))
        if main:
            require_unlocked(folder.absolute().parent)  # a sweep's, whose configuration it is
            check = partial(check_output, folder, resume=resume)
            held.enter_context(locked_folder(folder, check, partial(_say, console)))
        if resume and rendering is None:
            rendering = rendering_of(folder)
        setup = set_up(recipe, rendering=rendering, objective=own)
        held.callback(setup.close)
        if setup.source is not None:
            setup.source.require()
        if expected_data is not None:
            require_data(expected_data, setup.data_facts)
        if expected_rewards is not None:
            require_rewards(expected_rewards, setup.inputs.objective.reward_facts)
        if expected_environment is not None:
            require_environment(expected_environment, setup.environment_files)
        return _train(setup, console, main, resume, accept_changes, callbacks)


def _train(
    setup: Setup,
    console: Console,
    main: bool,
    resume: bool,
    accept_changes: bool,
    callbacks: Sequence[TrainerCallback],
) -> TrainResult:
    """`train`, in a folder that no other process writes."""
    folder, say = Path(setup.recipe.output_dir), partial(_say, console)
    identity = setup.identity
    finished = read_manifest(folder) if resume else None
    if finished is not None and same_run(finished, identity):
        require_same_view("the finished run", folder)
        say(f"{folder} is finished already: nothing is left to do")
        return TrainResult(folder, finished)
    if resume:
        ended = finished is not None
        found, changed = _resume(setup, identity, say, main, accept_changes, ended)
    else:
        found, changed = Found(), []
        if main:
            claim_output(folder, identity)
    say(*_description(setup))

    metrics = StepLines(folder / METRICS_NAME, writes=main)
    with named_failures(folder):
        trainer = setup.trainer()
        trainer.say = say
        trainer.forget_evaluations = changes_evaluation(changed)
        reader = trainer.forward.reader
        if isinstance(reader, SupervisedLoss) and not (reader.output or reader.adapted):
            say("the loss is taken of the model's own logits, at learned tokens alone")
        most = setup.recipe.data.image_features_mb << 20
        with (
            _callbacks(trainer, setup, metrics, console, callbacks),
            setup.fast(),
            pictures_kept(trainer, most) as kept,
        ):
            say(*([kept] if kept else []))
            steps = planned_steps(trainer.args, len(trainer.sampler))
            if not found.checkpoint and trainer.args.world_size == 1 and steps >= FORECAST_FROM:
                say(forecast(trainer).line)
            began = time.perf_counter()
            scores = _fit(trainer, setup, found.checkpoint)
        seconds = time.perf_counter() - began
        say(*(setup.data.stream.notice() if setup.data.stream else []))
        if trainer.start is not None:
            step = trainer.state.global_step
            say(*warn_of_unchanged(trainer.start, setup.model, step, metrics))
        manifest = manifest_of(setup, trainer, scores, metrics, seconds)
        if main and setup.inputs.templates is not None:  # so that chat and serve use the same
            write_templates(folder, setup.inputs.templates)
        # All processes help to gather what is spread.
        trainer.save_adapter(folder)
        if main:
            write_held_out_rewards(folder, scores)
            write_manifest(folder, manifest)  # its presence says that the run is finished
            if not trainer.is_spread:
                say(*write_samples(folder, setup))
            say(*write_report(folder).notices)
    return TrainResult(folder, manifest)


def _resume(
    setup: Setup,
    identity: dict[str, Any],
    say: Callable[..., None],
    main: bool,
    accept_changes: bool,
    ended: bool,
) -> tuple[Found, list[str]]:
    """Takes over the run in the folder; returns its checkpoint and the keys that changed since.

    Args:
        ended: the run had come to its end, by another recipe or with other data.
    """
    folder = Path(setup.recipe.output_dir)
    found, changes = newest_whole(folder), changes_since(folder, identity)
    last = found.checkpoint.name if found.checkpoint else None
    require_same_view(last, folder)
    say(*found.damaged)
    if not accept_changes:
        require_unchanged(changes, folder)
    notices = check_resume(setup, found, changes, finished=ended)
    also = missing_state(found, accept_changes=accept_changes)
    changed = [*changed_since(folder, found.step), *(change.key for change in changes)]
    if main:
        claim_output(folder, identity, changes, step=found.step, also=also)
    say(*(f"resuming with a change: {change.line}" for change in changes), *notices)
    say(f"resuming from {last}" if last else "no checkpoint yet: starting")
    return found, changed


def _description(setup: Setup) -> Iterator[str]:
    """What is about to be trained, what was chosen for it, and what was found in the rows."""
    model, data = setup.model, setup.data
    trained, total = model.get_nb_trainable_parameters()
    base, own = (
        str(next(iter(tensors)).dtype).removeprefix("torch.")
        for tensors in (
            model.get_base_model().parameters(),
            model.adapter_tensors(model.active_adapter).values(),
        )
    )
    yield (
        f"{setup.recipe.model} in {base}, adapter in {own}: {trained:,} of {total:,} "
        f"parameters are trained ({trained / total:.2%})"
    )
    if setup.inputs.start is not None:
        record = setup.inputs.start.record
        how = {"continue": "continues", "freeze": "is added to the frozen"}[record.mode]
        yield f"the adapter {how} {record.path} (sha256 {record.sha256[:12]})"
    numbers = data.statistics()["train"]
    use = "looked at" if data.stream else "to learn from"
    yield (
        f"{numbers.rows} rows {use} ({numbers.tokens:,} tokens, "
        f"{numbers.supervised:,} supervised), {len(data.eval)} held out"
    )
    yield from (f"chosen: {advice.line}" for advice in setup.advice)
    yield from setup.notices
    yield from (finding.line for finding in data.findings if finding.count)


@contextmanager
def _callbacks(
    trainer: LoraTrainer,
    setup: Setup,
    metrics: StepLines,
    console: Console,
    own: Sequence[TrainerCallback],
) -> Iterator[None]:
    """Everything that looks on while the block trains: times, warnings, progress, interrupts."""
    say, objective = trainer.say, trainer.objective
    bar = ProgressBar(trainer.counts, console, trainer.objective.shown_metrics)
    interrupt = Interrupt(say)
    trainer.interrupt = interrupt
    others: list[StepLines] = []
    if trainer.rollouts is not None:
        kept = StepLines(metrics.path.with_name(COMPLETIONS_NAME), writes=metrics.writes)
        trainer.rollouts.keep = kept.append
        others.append(kept)
    looking: list[TrainerCallback] = [
        Recorder(metrics, trainer.counts, objective.logged or objective.score_names, others),
        bar,
    ]
    if trainer.is_spread:
        say("weights are spread over processes: the adapter's changes are not measured")
    else:
        measured = StepLines(metrics.path.with_name(MONITOR_NAME), writes=metrics.writes)
        looking.append(Watch(setup.model, objective, measured, metrics, say))
    if patience := setup.recipe.early_stopping_patience:
        looking.append(EarlyStopping(patience))
    trainer.remove_callback(PrinterCallback)
    for callback in (*looking, *own, interrupt, SaveAfterEvaluation()):
        trainer.add_callback(callback)
    try:
        with interrupt.listening():
            yield
    finally:
        bar.close()  # an interrupted bar would leave the terminal without its cursor


def _fit(trainer: LoraTrainer, setup: Setup, checkpoint: Path | None) -> HeldOutScores:
    """Trains; returns the held-out loss and scores of the bare base, the start and the adapter."""
    patience = setup.recipe.early_stopping_patience
    start: dict[str, float] = {}
    if setup.inputs.start is not None and trainer.held_out and not trainer.is_spread:
        frozen = setup.model.active_adapters[1:]
        continues = setup.inputs.start.record.mode == "continue"
        route = setup.model.routing.route if continues else Route(shared=tuple(frozen))
        with setup.model.routing.using(route):
            start = trainer.held_out_scores()
    rows = {"start": trainer.objective.taken_held_out()}
    if checkpoint and (
        trainer.ends_at(checkpoint)
        or (patience and stopped_before(checkpoint, trainer.args, patience))
    ):
        trainer.take_up(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if not trainer.held_out:
        return HeldOutScores()
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    last: dict[str, float] = evaluations[-1] if evaluations else {}
    if last.get("step") == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        tuned = last
    else:
        tuned = trainer.evaluate()
    rows["tuned"] = trainer.objective.taken_held_out()
    if trainer.objective.samples_held_out and not rows["tuned"]:  # resumed at the end
        trainer.held_out_scores()
        rows["tuned"] = trainer.objective.taken_held_out()
    with bare(setup.model, trainer.objective.reference):
        base = trainer.held_out_scores()
    rows["base"] = trainer.objective.taken_held_out()
    found = {n: tuned[f"eval_{n}"] for n in base if f"eval_{n}" in tuned}
    return HeldOutScores(base, start, found, rows)


def _say(console: Console, *lines: str) -> None:
    for line in lines:
        console.print(one_line(line))


@contextmanager
def named_failures(folder: Path) -> Iterator[None]:
    """Turns a full disk, however a library reports it, into one line."""
    full = "Make room and resume with --resume: the last checkpoint is whole"
    try:
        yield
    except OSError as error:
        no_room = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        cure = full if no_room else "Resume from the last checkpoint with --resume"
        raise LorakitError(f"cannot write {folder}: {error.strerror or error}. {cure}") from error
    except torch.OutOfMemoryError as error:
        raise LorakitError(
            f"the GPU's {memory_mb() / 1e3:.0f} GB are not enough: {LESS_MEMORY}. "
            "Resume from the last checkpoint with --continue"
        ) from error
    except RuntimeError as error:
        # torch.save's own words for it, which differ with how far it came.
        words = ("PytorchStreamWriter", "unexpected pos", "iostream", "cannot be opened")
        if any(word in str(error) for word in words):
            raise LorakitError(f"cannot write {folder}: is the disk full? {full}") from error
        raise
