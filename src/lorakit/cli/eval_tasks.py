"""The part of `lorakit eval` that scores a base and its adapters on tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.tables import print_table
from lorakit.console import say, say_all

if TYPE_CHECKING:
    from lorakit.engine.engine import Engine
    from lorakit.evaluation.harness import HarnessEvaluation, HarnessSettings, TaskMetric


def evaluate_on_tasks(
    adapters: Mapping[str, Path],
    settings: HarnessSettings,
    options: Mapping[str, Any],
    batch_size: int | None,
) -> HarnessEvaluation:
    """The base and the adapters on tasks.

    Args:
        adapters: by name.
        options: `base`, `dtype`, `quantization` and `weights`.
        batch_size: answers that are written at once; None for as many as the memory holds.

    Raises:
        InputError: as `evaluate_tasks` and `open_engine`, or a name cannot be used.
    """
    from lorakit.engine.open_engine import open_beside
    from lorakit.errors import InputError
    from lorakit.evaluation.harness import BASE_NAME, evaluate_tasks, require_lm_eval

    require_lm_eval()
    if BASE_NAME in adapters:
        raise InputError(
            f"an adapter cannot be called {BASE_NAME} beside the base: give it another name, as in "
            f"tuned={adapters[BASE_NAME]}"
        )
    how = {name: options[name] for name in ("dtype", "quantization", "weights")}
    engine, alone = open_beside(options["base"], adapters, **how, max_rows=batch_size)
    try:
        say_all(engine.notices)
        beside = {name: path for name, path in adapters.items() if name not in alone}
        merged = _merged(options["base"], {name: adapters[name] for name in alone}, how, batch_size)
        return evaluate_tasks(engine, beside, settings, merged)
    finally:
        engine.close()


def _merged(
    base: str | None, adapters: Mapping[str, Path], how: Mapping[str, Any], max_rows: int | None
) -> Iterator[tuple[str, Path, Engine]]:
    """Each of these adapters in a base of its own, which is let go of before the next."""
    from lorakit.engine.open_engine import open_engine

    for name, path in adapters.items():
        engine = open_engine(base, {name: path}, merged=True, max_rows=max_rows, **how)
        try:
            yield name, path, engine
        finally:
            engine.close()


def show_tasks(result: HarnessEvaluation) -> None:
    """The values with their standard errors, and what is better or worse than the base."""
    say_all(result.notices)
    names = [*result.models]
    rows = [
        (
            *(one.task, one.metric, str(one.num_fewshot), str(one.documents)),
            *(_shown(one, name) for name in names),
        )
        for one in result.metrics
    ]
    title = f"{result.seconds:.0f} s; ± is the standard error"
    print_table(title, ("task", "metric", "n-shot", "documents", *names), rows)
    for name in names[1:]:
        for verdict, heading in (("better", "better"), ("worse", "worse (forgetting)")):
            told = [_told(one, name) for one in result.metrics if _is(one, name, verdict)]
            if told:
                say(f"{name} is {heading}: {'; '.join(told)}")
        unclear = sum(_is(one, name, "unclear") for one in result.metrics)
        if unclear:
            say(f"{name}: {unclear} of {len(result.metrics)} metrics differ by no more than chance")


def _is(one: TaskMetric, name: str, verdict: str) -> bool:
    return one.changes[name].verdict == verdict


def _shown(one: TaskMetric, name: str) -> str:
    score = one.scores[name]
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def _told(one: TaskMetric, name: str) -> str:
    own = one.changes[name]
    interval = f" (95% interval {own.low:+.4f} to {own.high:+.4f})" if own.low is not None else ""
    return f"{one.task} {one.metric} {own.difference:+.4f}{interval}"
