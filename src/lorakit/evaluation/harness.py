"""Tasks of lm-evaluation-harness, answered by a base and its adapters in one engine.

The tasks, their metrics and standard errors are the harness's own; here tasks are loaded, all
models are asked, and what an adapter does better or worse than its base is told from chance.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from lorakit.errors import InputError, LorakitError, did_you_mean, first_line
from lorakit.evaluation.harness_index import HarnessIndex, members_of

if TYPE_CHECKING:
    from lorakit.engine.engine import Engine

BASE_NAME = "base"
_95 = 1.96  # standard errors on each side

Verdict = Literal["better", "worse", "unclear"]


@dataclass(frozen=True)
class HarnessSettings:
    """What is asked, by the names that lm-evaluation-harness has.

    Args:
        tasks: names, patterns as `mmlu_*`, YAML files, and folders of them.
        num_fewshot: worked examples in the prompt; None is the task's own number.
        limit: documents of each task; None is all.
        include_path: a folder with further tasks.
        apply_chat_template: prompts are conversations in the model's chat template.
        fewshot_as_multiturn: worked examples are turns of their own there.
        seed: of worked examples and of sampled answers.
        confirm_run_unsafe_code: tasks may run code that the model has written.
    """

    tasks: Sequence[str]
    num_fewshot: int | None = None
    limit: int | None = None
    include_path: Path | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    seed: int = 1234
    confirm_run_unsafe_code: bool = False


@dataclass(frozen=True)
class Score:
    """A metric of one model, with its standard error where the harness knows one."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Change:
    """An adapter's value minus the base's, and the ends of its 95% interval.

    The interval is paired by documents where the metric is their mean: what makes a document hard
    for both cancels. `verdict` is unclear where the interval holds 0 or there is none.
    """

    difference: float
    low: float | None
    high: float | None
    verdict: Verdict


@dataclass(frozen=True)
class TaskMetric:
    """A metric of a task or group: `scores` by model, `changes` by adapter."""

    task: str
    metric: str
    higher_is_better: bool
    num_fewshot: int
    documents: int
    scores: dict[str, Score]
    changes: dict[str, Change]


@dataclass(frozen=True)
class HarnessEvaluation:
    """The base beside its adapters.

    Attributes:
        models: the base's folder or name under `base`, and the adapters' folders.
        metrics: in the order of the tasks.
        versions: of the tasks.
        lm_eval_version: of the harness.
        settings: as they were asked for.
        notices: what a user should know.
        samples: of each model and task the documents, answers and values.
    """

    models: dict[str, str]
    metrics: list[TaskMetric]
    versions: dict[str, Any]
    lm_eval_version: str
    settings: dict[str, Any]
    notices: list[str]
    seconds: float
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self, samples: bool = False) -> dict[str, Any]:
        """As plain JSON types, with the documents if `samples`."""
        result = asdict(self)
        if not samples:
            del result["samples"]
        return result


def require_lm_eval() -> None:
    """Raises InputError where lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise InputError("--tasks needs lm-evaluation-harness: pip install 'lorakit[lm-eval]'")


def evaluate_tasks(
    engine: Engine,
    adapters: Mapping[str, Path],
    settings: HarnessSettings,
    alone: Iterable[tuple[str, Path, Engine]] = (),
) -> HarnessEvaluation:
    """Scores the engine's base and its adapters on tasks.

    Args:
        engine: with the adapters in its pool, by their names.
        alone: adapters that are merged into a base of their own, by name, and the engine of each;
            they are asked one after the other.

    Raises:
        InputError: there is no such task, its data are not there, or it cannot be asked.
        LorakitError: the model failed.
    """
    require_lm_eval()
    from importlib.metadata import version

    from lorakit.evaluation.harness_model import EngineLM

    began = time.perf_counter()
    notices = Counter[str]()
    with _quiet():
        loaded = _loaded(settings, notices)
        state = _random_state()
        models: dict[str, EngineLM] = {}
        options: dict[str, Any] = {"chat": settings.apply_chat_template, "seed": settings.seed}
        peers: list[EngineLM] = []
        for name in (BASE_NAME, *adapters):
            model = None if name == BASE_NAME else name
            peers.append(EngineLM(engine, model, peers=peers, notices=notices, **options))
            models[name] = peers[-1]
        results = {name: _evaluated(loaded, lm, settings, state) for name, lm in models.items()}
        adapters = dict(adapters)
        for name, path, merged in alone:
            lm = EngineLM(merged, None, notices=notices, **options)
            results[name] = _evaluated(loaded, lm, settings, state)
            adapters[name] = path
    samples = {name: result["samples"] for name, result in results.items()}
    said = [f"{text} ({n:,} times)" if n > 1 else text for text, n in notices.items()]
    for name in adapters:
        if _same_answers(samples[BASE_NAME], samples[name]):
            said.append(
                f"{name} answers every request exactly as the base does: is its update zero, or "
                "is it for other modules? See lorakit inspect"
            )
    return HarnessEvaluation(
        {BASE_NAME: engine.model_name, **{name: str(path) for name, path in adapters.items()}},
        _metrics(results),
        results[BASE_NAME]["versions"],
        version("lm_eval"),
        {**asdict(settings), "include_path": settings.include_path and str(settings.include_path)},
        said,
        round(time.perf_counter() - began, 2),
        samples,
    )


# --- tasks ------------------------------------------------------------------------------------


def _loaded(settings: HarnessSettings, notices: Counter[str]) -> Any:
    """The tasks, as `TaskManager.load` gives them."""
    import numpy as np
    from lm_eval.tasks import TaskManager

    random.seed(0)  # the harness's own seeds: some tasks shuffle choices by them
    np.random.seed(settings.seed)
    folders = [Path(name) for name in settings.tasks if Path(name).is_dir()]
    included = [*([settings.include_path] if settings.include_path else []), *folders]
    for folder in included:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder with tasks")
    manager = TaskManager(include_path=included or None, include_defaults=False)
    own, builtin = manager.all_tasks, HarnessIndex()
    names: list[str] = []
    for name in settings.tasks:
        found = [name]
        if Path(name).is_dir():
            found = TaskManager(include_path=Path(name), include_defaults=False).all_subtasks
        elif not _is_path(name) and name not in own:
            found = list(dict.fromkeys([*manager.match_tasks([name]), *builtin.matching(name)]))
        if not found:
            alike = [task for task in (*own, *builtin.files) if task[:1] == name[:1]]  # of many
            near = did_you_mean(name, alike)
            raise InputError(f"--tasks: lm-evaluation-harness has no task {name!r}{near}")
        names += found
    groups = [entry.cfg for entry in manager.task_index.values() if entry.kind.name == "GROUP"]
    members = [one for config in groups if config for one in members_of(config.get("task"))]
    wanted = [name for name in (*names, *members) if name not in own]
    if any(not _is_path(name) for name in wanted):
        builtin.add(wanted, manager.task_index)
    merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(names):
        try:
            own = manager.load(name)
        except Exception as error:  # a task may run code of its own
            raise InputError(_why_not_loaded(name, error)) from error
        for kind in merged:
            merged[kind] |= own[kind]
    for name, task in merged["tasks"].items():
        _set_fewshot(name, task, settings.num_fewshot, notices)
    return merged


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or Path(name).is_dir()


def _why_not_loaded(name: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"task {name} needs the package {error.name}: install it"
    chain: list[Exception] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        if not isinstance(cause, Exception):
            break
        chain.append(cause)
    offline = [one for one in chain if isinstance(one, ConnectionError | TimeoutError)]
    remote = [one for one in chain if type(one).__module__.startswith(("huggingface_hub", "httpx"))]
    if offline or remote:
        return (
            f"task {name}: its data are not on this machine and cannot be downloaded "
            f"({first_line(error)}): download them where there is a network, or give a task with "
            "local files, as --tasks my_task.yaml"
        )
    return f"task {name} cannot be loaded: {type(error).__name__}: {first_line(error)}"


def _set_fewshot(name: str, task: Any, wanted: int | None, notices: Counter[str]) -> None:
    own = task.get_config("num_fewshot")
    if wanted is None:
        if own is None:
            task.set_config(key="num_fewshot", value=0)
    elif own == 0:
        if wanted:
            notices[f"{name} says num_fewshot: 0, which stays"] += 1
    else:
        task.set_config(key="num_fewshot", value=wanted)


def _evaluated(loaded: Any, lm: Any, settings: HarnessSettings, state: Any) -> dict[str, Any]:
    """The harness's results of one model."""
    import numpy as np
    from lm_eval.evaluator import evaluate

    random.setstate(state[0])
    np.random.set_state(state[1])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=settings.seed)
    try:
        result: dict[str, Any] = evaluate(
            lm,
            loaded,
            limit=settings.limit,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template and settings.fewshot_as_multiturn,
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
        )
    except LorakitError:
        raise
    except Exception as error:
        raise InputError(f"the tasks cannot be evaluated: {_told(error)}") from error
    return result


def _told(error: Exception) -> str:
    text = first_line(error)
    if "marked as unsafe" in text:
        return f"{text.partition('. Set')[0]}: --confirm-run-unsafe-code runs it"
    return f"{type(error).__name__}: {text}"


def _random_state() -> Any:
    import numpy as np

    return random.getstate(), np.random.get_state()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints, draws bars and warns; what a user needs is in the result's notices."""
    names = ("lm_eval", "datasets", "evaluate")
    levels = {name: logging.getLogger(name).level for name in names}
    from tqdm import tqdm

    before = tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = silent
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        tqdm.__init__ = before
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


# --- comparison -------------------------------------------------------------------------------


def _metrics(results: Mapping[str, dict[str, Any]]) -> list[TaskMetric]:
    base = results[BASE_NAME]
    found = []
    for task, values in base["results"].items():
        for key in values:
            metric, comma, kept_by = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(values[key]):
                continue
            upward = base["higher_is_better"].get(task, {}).get(metric)
            scores = {
                name: Score(
                    float(result["results"][task][key]),
                    _number(result["results"][task].get(f"{metric}_stderr,{kept_by}")),
                )
                for name, result in results.items()
            }
            of_documents = {
                name: _of_documents(result["samples"].get(task, []), metric, kept_by)
                for name, result in results.items()
            }
            found.append(
                TaskMetric(
                    task,
                    metric if kept_by == "none" else f"{metric},{kept_by}",
                    upward is not False,
                    int(base["n-shot"].get(task) or 0),
                    int(values.get("sample_len") or 0),
                    scores,
                    {
                        name: change(
                            scores[BASE_NAME],
                            scores[name],
                            of_documents[BASE_NAME],
                            of_documents[name],
                            upward is not False,
                        )
                        for name in results
                        if name != BASE_NAME
                    },
                )
            )
    return found


def _of_documents(samples: Sequence[Mapping[str, Any]], metric: str, kept_by: str) -> list[Any]:
    return [one[metric] for one in samples if one["filter"] == kept_by and metric in one]


def change(
    base: Score,
    own: Score,
    base_values: Sequence[Any],
    own_values: Sequence[Any],
    higher_is_better: bool,
) -> Change:
    """An adapter's score minus the base's.

    Args:
        base_values, own_values: of the documents, in one order; they are paired where both scores
            are their means.
    """
    difference = own.value - base.value
    stderr: float | None = None
    if _is_mean(base, base_values) and _is_mean(own, own_values):
        apart = [float(b) - float(a) for a, b in zip(base_values, own_values, strict=True)]
        if len(apart) > 1:
            stderr = stdev(apart) / math.sqrt(len(apart))
    elif base.stderr is not None and own.stderr is not None:
        stderr = math.hypot(base.stderr, own.stderr)
    if stderr is None:
        return Change(difference, None, None, "unclear")
    low, high = difference - _95 * stderr, difference + _95 * stderr
    if low <= 0 <= high:
        return Change(difference, low, high, "unclear")
    rises = difference > 0
    return Change(difference, low, high, "better" if rises == higher_is_better else "worse")


def _is_mean(score: Score, values: Sequence[Any]) -> bool:
    if not values or not all(_is_number(value) for value in values):
        return False
    return math.isclose(fmean(map(float, values)), score.value, rel_tol=1e-9, abs_tol=1e-12)


def _is_number(value: Any) -> bool:
    import numbers

    import numpy as np

    return isinstance(value, numbers.Real | np.number | np.bool_)


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(float(value)) else None


def _same_answers(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = [(a["resps"], b["resps"]) for task in one for a, b in zip(one[task], other[task])]  # noqa: B905
    return bool(pairs) and all(a == b for a, b in pairs)


def plain(value: Any) -> Any:
    """Documents and answers as plain JSON types."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(value, default=handle_non_serializable))
