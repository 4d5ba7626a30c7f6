"""The part of `lorakit eval` that scores an adapter by rewards, beside its base or another one.

The rewards are those that the command line names, or of the adapter's record the built-in ones: a
file that a record names is somebody's program, and is run only where the user names it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.tables import print_table
from lorakit.console import say, say_all

if TYPE_CHECKING:
    from lorakit.bootstrap import Interval
    from lorakit.evaluation.mean_rewards import RewardComparison

_BASE, _TUNED = "base", "tuned"


def recorded_rewards(objective: Any) -> tuple[list[Any], list[float] | None, list[str]]:
    """The built-in rewards of a record with their weights, and notices of the others.

    Args:
        objective: `Manifest.recipe["objective"]`.
    """
    given = objective.get("rewards") if isinstance(objective, Mapping) else None
    if not given:
        return [], None, []
    from lorakit.rewards.reward_specs import foreign_rewards, is_own

    weights = objective.get("weights") or [1.0] * len(given)
    kept = [(one, w) for one, w in zip(given, weights, strict=False) if is_own(one)]
    notices = []
    if others := foreign_rewards(objective):
        named = " ".join(f"--rewards {one}" for one in others)
        notices.append(
            f"the functions that the record names are not run ({', '.join(others)}): name them if "
            f"you trust them, as in {named}"
        )
    if not any(weight for _, weight in kept):
        return [], None, notices
    return [one for one, _ in kept], [weight for _, weight in kept], notices


def evaluate_by_rewards(
    adapter: Path,
    against: Path | None,
    samples: Sequence[Any],
    specs: Sequence[Any],
    weights: Sequence[float] | None,
    options: Mapping[str, Any],
    *,
    number: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> RewardComparison:
    """Mean rewards of an adapter and of its base, or of `against` and the adapter.

    Args:
        options: of `open_adapter`.
        number: completions of each prompt.

    Raises:
        InputError: a reward cannot be loaded, rows lack a column, or an adapter cannot be opened.
    """
    from lorakit.engine.sampling import Sampling
    from lorakit.errors import InputError
    from lorakit.evaluation.mean_rewards import compare_rewards
    from lorakit.evaluation.reward_scorer import reward_scorer
    from lorakit.rewards.inputs_of_rows import reward_columns
    from lorakit.rewards.rewards import Rewards
    from lorakit.rl.trial_completions import sampled_completions

    began = time.perf_counter()
    if against is not None and against.resolve() == adapter.resolve():
        raise InputError(f"--against {against}: it is the same adapter")
    own = {name: value for name, value in options.items() if name != "base"}
    with Rewards.opened(
        [*specs], weights, scorer=lambda folder: reward_scorer(folder, **own)
    ) as rewards:
        for sample in samples:
            rewards.check([*reward_columns(sample)], sample.where)
        sampling = Sampling(temperature, max_new_tokens=max_new_tokens, seed=seed)
        written = {
            name: sampled_completions(model, tokenizer, samples, number, sampling)
            for name, model, tokenizer in _models(adapter, against, options)
        }
        return compare_rewards(rewards, written, number, began)


def _models(
    adapter: Path, against: Path | None, options: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """What is compared, (name, model, tokenizer), one after the other."""
    from lorakit.adapters.open import open_adapter

    if against is not None:
        for folder in (against, adapter):
            opened = open_adapter(folder, **options)
            yield str(folder), opened.model, opened.tokenizer
        return
    opened = open_adapter(adapter, **options)
    with opened.model.disable_adapter():
        yield _BASE, opened.model, opened.tokenizer
    yield _TUNED, opened.model, opened.tokenizer


def show_rewards(result: RewardComparison) -> None:
    """The means with their intervals, and the difference."""
    say_all(result.notices)
    first, second = result.models
    title = f"{result.prompts} prompts, {result.seconds:.0f} s; 95% intervals over prompts"
    rows = [
        (one.name, _shown(one.means[first]), _shown(one.means[second]), _shown(one.difference))
        for one in result.rewards
    ]
    print_table(title, ("reward", first, second, "difference"), rows)
    for one in result.rewards:
        if one.difference is not None and one.difference.holds_zero:
            say(f"{one.name}: the interval of the difference holds 0, so that it may be chance")


def _shown(interval: Interval | None) -> str:
    if interval is None:
        return "None"
    return f"{interval.mean:.4f} ({interval.low:.4f} to {interval.high:.4f})"
