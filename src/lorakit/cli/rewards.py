"""`lorakit rewards`: reward functions on rows and on a model's completions, before a run."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.shared_options import (
    DtypeOption,
    QuantizationOption,
    column_names,
    reward_specs,
)
from lorakit.cli.tables import print_table
from lorakit.console import say, say_all

if TYPE_CHECKING:
    from lorakit.evaluation.reward_trial import RewardSummary, RewardTrial

_SHOWN = 200  # characters of a completion
_PROMPTS, _SAMPLES = 8, 8


@dataclass
class _Asked:
    """What is tried, on which rows, and how completions are sampled."""

    rewards: list[Any] = field(default_factory=list)
    weights: list[float] | None = None
    timeout: float = 60.0
    model: str | None = None
    adapter: str | None = None
    data: Any = None
    columns: dict[str, str] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    samples: int = _SAMPLES


def rewards(
    functions: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE.yaml [KEY=VALUE]... | REWARD...",
            help="A recipe with rewards; or a file (all its reward functions), rewards.py:NAME, "
            "module:NAME, a built-in reward, or one with settings, as '{regex: \"^[0-9]+$\"}'.",
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="The rows: a file, a folder, or a hub id.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model, to try completions that it samples.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter's folder, to try completions that it samples.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Completions of each prompt; 0 samples none.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts that are sampled.")] = _PROMPTS,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first rows.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Column names, as prompt=question,completion=answer.")
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens of a completion. Default: 256.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sampling temperature. Default: 1.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for sampling.")] = 42,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.001, help="Seconds that a call of a function may take. Default: 60."),
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="Completions shown with rewards.")] = 4,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="A JSON file for all rewards.")
    ] = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
) -> None:
    """Try reward functions on rows and on sampled completions.

    This runs the files that are named. The rows' own answers are scored first; with a recipe,
    --model or --adapter, completions of the first prompts as well.
    """
    from lorakit import atomic
    from lorakit.data.mixing import mix
    from lorakit.errors import InputError
    from lorakit.evaluation.reward_scorer import reward_scorer
    from lorakit.evaluation.reward_trial import own_answers, tried
    from lorakit.rewards.rewards import Rewards

    asked = _of_recipe(functions) if _names_recipe(functions) else _of_names(functions)
    asked.data = data or asked.data
    if not asked.data:
        raise InputError("--data: give the rows, or a recipe that names them")
    if model is not None or adapter is not None:
        asked.model, asked.adapter = model, str(adapter) if adapter else None
    asked.columns = column_names(columns) if columns else asked.columns
    options = {"dtype": dtype, "quantization": quantization}
    mixture = mix(
        asked.data,
        asked.columns,
        limit,
        key="--data",
        kinds=("conversation", "prompt"),
        keeps_columns=True,
    )
    say_all(mixture.notices)
    given = {"temperature": temperature, "max_new_tokens": max_completion_length}
    sampling = {"temperature": 1.0, "max_new_tokens": 256} | asked.sampling
    sampling |= {name: value for name, value in given.items() if value is not None}
    number = asked.samples if samples is None else samples
    trials: list[RewardTrial] = []
    with ExitStack() as stack:
        opened = stack.enter_context(
            Rewards.opened(
                asked.rewards,
                asked.weights,
                asked.timeout if timeout is None else timeout,
                scorer=lambda folder: reward_scorer(folder, **options),
            )
        )
        for sample in mixture.samples:
            opened.check([*_columns(sample)], sample.where)
        loaded = None
        if number and (asked.model or asked.adapter):
            loaded = _loaded(asked, options)
        answers = own_answers(mixture.samples, loaded[1] if loaded else None)
        if answers:
            trials.append(tried(opened, answers, 1, "the rows' own answers"))
            _show(trials[-1], examples)
        if loaded is not None:
            from lorakit.engine.sampling import Sampling
            from lorakit.evaluation.reward_trial import worse_than_sampled
            from lorakit.rl.trial_completions import sampled_completions

            written = sampled_completions(
                *loaded, mixture.samples[:prompts], number, Sampling(**sampling, seed=seed)
            )
            trials.append(tried(opened, written, number, "sampled completions"))
            _show(trials[-1], examples)
            if answers:
                for line in worse_than_sampled(*trials):
                    say(f"! {line}")
    if not trials:
        raise InputError(
            f"{mixture.name}: no row has an answer of its own: give --model or --adapter, so that "
            "completions are sampled"
        )
    if json_file:
        text = json.dumps([trial.to_dict() for trial in trials], indent=2, ensure_ascii=False)
        atomic.write_file(json_file, text + "\n")


def _names_recipe(functions: Sequence[str]) -> bool:
    return functions[0].lower().endswith((".yaml", ".yml"))


def _of_recipe(arguments: list[str]) -> _Asked:
    """The rewards of a recipe, with its rows, its model and its way of sampling."""
    from lorakit.cli.recipes import recipe_from
    from lorakit.errors import InputError

    recipe = recipe_from(arguments, {}, {"output_dir": "not-written"})
    objective = recipe.objective or {}
    if not objective.get("rewards"):
        raise InputError(f"{arguments[0]}: has no rewards: they belong into objective, type grpo")
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling = {name: objective[name] for name in names if name in objective}
    if "max_completion_length" in objective:
        sampling["max_new_tokens"] = objective["max_completion_length"]
    return _Asked(
        objective["rewards"],
        objective.get("weights"),
        objective.get("reward_timeout", 60.0),
        recipe.model,
        recipe.adapter.path if recipe.adapter else None,
        recipe.data.train,
        recipe.data.columns or None,
        sampling,
        objective.get("num_generations", _SAMPLES),
    )


def _of_names(functions: Sequence[str]) -> _Asked:
    """The rewards that the command line names; of a file alone, all its reward functions."""
    return _Asked(reward_specs(functions))


def _loaded(asked: _Asked, options: dict[str, Any]) -> tuple[Any, Any]:
    """The model that samples, with the adapter if one is named, and its tokenizer."""
    from lorakit.adapters.open import open_adapter
    from lorakit.lora.model import LoraModel
    from lorakit.models.load import load_model

    if asked.adapter:
        opened = open_adapter(asked.adapter, base=asked.model, **options)
        return opened.model, opened.tokenizer
    bare, tokenizer = load_model(str(asked.model), **options)
    return LoraModel(bare, None).eval(), tokenizer


def _columns(sample: Any) -> dict[str, Any]:
    from lorakit.rewards.inputs_of_rows import reward_columns

    return reward_columns(sample)


def _show(trial: "RewardTrial", examples: int) -> None:
    """The table, what is wrong, and some completions with their rewards."""
    groups = trial.group_size > 1
    number = len(trial.asked)
    title = f"{trial.what}: {number} completion{'' if number == 1 else 's'}"
    if groups:
        title += f" of {number // trial.group_size} prompts"
    headings = ("reward", "mean", "std", "min", "max", "None", "s a call")
    more = ("groups with signal",) if groups else ()
    print_table(title, (*headings, *more), [_line(one, groups) for one in trial.summaries])
    problems = [problem.line for problem in trial.table.problems]
    for line in [*problems, *trial.findings]:
        say(f"! {line}")
    for one, values in _examples(trial, examples):
        say(f"{one.where}: {_values(trial, values)}")
        say(f"    {_short(one.completion)}")
    say("")


def _line(one: "RewardSummary", groups: bool) -> tuple[str, ...]:
    numbers = (one.mean, one.std, one.low, one.high)
    return (
        one.name,
        *("-" if value is None else f"{value:.4g}" for value in numbers),
        f"{one.none:.0%}",
        "" if one.seconds is None else f"{one.seconds:.3g}",
        *(("-" if one.signal is None else f"{one.signal:.0%}",) if groups else ()),
    )


def _examples(trial: "RewardTrial", number: int) -> Iterator[tuple[Any, list[float]]]:
    """So many completions, from the highest reward to the lowest."""
    totals = trial.table.totals.nan_to_num(-math.inf).tolist()
    order = sorted(range(len(totals)), key=lambda i: -totals[i])
    if not order or not number:
        return
    step = (len(order) - 1) / max(1, number - 1)
    for place in dict.fromkeys(round(i * step) for i in range(number)):
        if place < len(order):
            i = order[place]
            yield trial.asked[i], trial.table.values[i].tolist()


def _values(trial: "RewardTrial", values: Sequence[float]) -> str:
    named = zip(trial.table.names, values, strict=True)
    return ", ".join(f"{n} {'None' if math.isnan(v) else f'{v:.4g}'}" for n, v in named)


def _short(completion: Any) -> str:
    from lorakit.rewards.completion_text import text_of

    text = " ".join(text_of(completion).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
