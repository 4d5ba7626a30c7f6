"""What a sweep is asked to do: the recipe's `sweep` block, with the command line's wishes over it.

The recipe itself is `lorakit.training.recipe`'s; here its `sweep` block is taken out of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from lorakit.errors import InputError, did_you_mean
from lorakit.evaluation.metrics import METRICS, score_name
from lorakit.objectives.objective import Objective
from lorakit.training.recipe import Recipe, load_recipe
from lorakit.training.recipe_errors import in_one_line
from lorakit.training.yaml_file import parse_yaml, read_yaml

Engine = Literal["together", "solo", "ray"]

SAMPLERS = ("grid", "random", "tpe", "gp", "cmaes", "qmc", "nsgaii")
"""The grid, random draws, and Optuna's samplers by its own names for them."""

_RANGE = re.compile(r"\s*(?P<low>[-+.\deE]+?)\s*\.\.\s*(?P<high>[-+.\deE]+)\s*")


class Range(BaseModel):
    """Every value from `low` to `high`; whole numbers where both are.

    Drawn evenly, or by its logarithm with `log` (None: where `high` is ten times `low` or more).
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    low: int | float
    high: int | float
    log: bool | None = None

    @model_validator(mode="after")
    def _upwards(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"a range goes upwards, not from {self.low:g} to {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a range by logarithm begins above 0, not at {self.low:g}")
        return self

    @property
    def by_log(self) -> bool:
        """Whether it is drawn by its logarithm."""
        return self.low > 0 and self.high >= 10 * self.low if self.log is None else self.log

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


class SweepSettings(BaseModel):
    """What is swept and how.

    Attributes:
        over: recipe keys, each with the values or the range that it takes.
        sampler: one of `SAMPLERS`.
        trials: configurations that are drawn; the grid has its own number.
        prune: whether losers are stopped early.
        reduction_factor: at each rung one in this many is promoted.
        objective: what the best is chosen by: `loss`, a held-out score of what is learned
            (`accuracy`, `margin`, …), or a metric of `lorakit eval`.
        selection: the share of the held-out rows that choosing sees; the others are reported on.
        seed: of draws and of the split of held-out rows; None for the recipe's.
        engine: `together` trains groups in shared batches, `solo` one after the other, `ray` groups
            on the workers of a cluster.
        workers: of the engine `ray`; None for one a GPU, or one a node where there are none.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    over: dict[str, Range | list[Any]] = {}
    sampler: str = "grid"
    trials: Annotated[int, Field(ge=1, le=10_000)] | None = None
    prune: bool = True
    reduction_factor: Annotated[int, Field(ge=2, le=100)] = 3
    objective: Annotated[str, AfterValidator(score_name)] = "loss"
    selection: Annotated[float, Field(gt=0, lt=1)] = 0.5
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    engine: Engine = "together"
    workers: Annotated[int, Field(ge=1, le=10_000)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.sampler not in SAMPLERS:
            near = did_you_mean(self.sampler, SAMPLERS)
            raise ValueError(
                f"sweep.sampler cannot be '{self.sampler}'{near}: {', '.join(SAMPLERS)}"
            )
        if self.sampler == "grid" and self.trials is not None:
            raise ValueError("sweep.trials is for a sampler that draws: add --sampler random")
        if self.sampler != "grid" and self.trials is None:
            raise ValueError(f"sweep.trials is missing: how many draws of {self.sampler}?")
        if self.workers is not None and self.engine != "ray":
            raise ValueError("sweep.workers is for the engine ray: add --engine ray")
        return self


def load_sweep(
    source: str | Path | Mapping[str, Any] | Recipe | None,
    overrides: Iterable[str | tuple[str, Any]] = (),
    over: Mapping[str, Any] | Iterable[str] = (),
    given: Mapping[str, Any] | None = None,
) -> tuple[Recipe, SweepSettings]:
    """The recipe that is swept, and what is swept.

    Args:
        source, overrides: as in `load_recipe`; the recipe may have a `sweep` block.
        over: recipe keys with their values, or `key=a,b,c` and `key=low..high` as on the command
            line; they take the place of the block's.
        given: other settings, over the block's; those that are None were not given.

    Raises:
        InputError: one line that names the key.
    """
    if isinstance(source, Recipe):
        values: Any = source.model_dump(mode="json", exclude_unset=True)
    elif isinstance(source, (str, Path)):
        values = read_yaml(Path(source))
    else:
        values = dict(source or {})
    block: Any = values.pop("sweep", None)
    block = {} if block is None else block
    if not isinstance(block, Mapping):
        raise InputError("sweep should be keys and values like {over: {lora.r: [4, 8]}}")
    axes = block.get("over") or {}
    if not isinstance(axes, Mapping):
        raise InputError("sweep.over should be keys with their values, like {lora.r: [4, 8]}")
    axes = dict(axes)
    axes |= over if isinstance(over, Mapping) else dict(parse_over(text) for text in over)
    wishes = {key: value for key, value in (given or {}).items() if value is not None}
    try:
        settings = SweepSettings.model_validate({**block, **wishes, "over": axes})
    except ValidationError as error:
        raise InputError(_one_line(error)) from error
    try:
        recipe = load_recipe(values, overrides)
    except InputError as error:
        if isinstance(source, (str, Path)):
            named = str(error).replace("recipe: ", f"{source}: ", 1)
            raise InputError(named) from error
        raise
    objective = recipe.make_objective()
    if objective.answers or objective.score_names:  # else its rows decide what it is scored by
        check_criterion(settings.objective, objective)
    return recipe, settings


def criteria(objective: Objective) -> list[str]:
    """What configurations of an objective can be chosen by: loss, its scores, and of answers."""
    answers = METRICS if objective.answers else ()
    return ["loss", *objective.score_names, *answers]


def check_criterion(name: str, objective: Objective) -> None:
    """Raises InputError unless configurations of an objective can be chosen by `name`."""
    known = criteria(objective)
    if name in known:
        return
    if name in METRICS:
        why = f"{objective.name} writes no answers, which {name} scores"
    else:
        why = f"there is no '{name}'{did_you_mean(name, known)}"
    raise InputError(f"sweep.objective: {why}; {objective.name} has {', '.join(known)}")


def parse_over(text: str) -> tuple[str, Any]:
    """`lora.r=4,8` as `("lora.r", [4, 8])`, and `key=low..high` as a range."""
    key, equals, listed = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(f"--over {text}: write key=values, as in lora.r=4,8,16")
    if found := _RANGE.fullmatch(listed):
        ends = {name: parse_yaml(found[name]) for name in ("low", "high")}
        if all(isinstance(end, (int, float)) for end in ends.values()):
            return key, ends
    try:
        values = parse_yaml(f"[{listed}]")
    except InputError as error:
        raise InputError(f"--over {text}: {error}") from error
    return key, values


def _one_line(error: ValidationError) -> str:
    """pydantic's findings under the names that a recipe has for them."""
    first = error.errors()[0]
    if first["loc"][:1] == ("over",) and len(first["loc"]) > 1:
        key = first["loc"][1]
        if first["type"] == "value_error":
            return f"--over {key}: {first['msg'].removeprefix('Value error, ')}"
        return f"--over {key}: give a list of values, or a range {{low: …, high: …}}"
    line = in_one_line(error, SweepSettings)
    return line if line.startswith("sweep.") else f"sweep.{line}"
