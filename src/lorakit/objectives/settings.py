"""An objective's settings, the keys beside `type` in the recipe's `objective`, and their errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from lorakit.errors import InputError, did_you_mean, listed


class UnknownSettingError(InputError):
    """A setting that an objective does not have.

    Args:
        objective, name: its names.
    """

    def __init__(self, message: str, objective: str, name: str) -> None:
        super().__init__(message)
        self.objective, self.name = objective, name


class Settings(BaseModel):
    """The settings of an objective that has none; others are subclasses."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Chosen = TypeVar("Chosen", bound=Settings)


def checked_settings(kind: type[Chosen], objective: str, given: Mapping[str, Any]) -> Chosen:
    """The settings of the kind that an objective has.

    Raises:
        InputError: a setting is not one of the objective's (`UnknownSettingError`), or has a wrong
            value.
    """
    try:
        return kind(**given)
    except ValidationError as error:
        found = error.errors()[0]
        key = ".".join(map(str, found["loc"]))
        known = list(kind.model_fields)
        if found["type"] == "extra_forbidden":
            short = next((name for name in known if key.endswith(f"_{name}")), key)
            reason = f"is not a setting of {objective}{did_you_mean(short, known)}; it has"
            line = f"objective.{key} {reason} {listed(['type', *known])}"
            raise UnknownSettingError(line, objective, key) from error
        message = found["msg"].removeprefix("Value error, ")
        if not key:  # settings that do not fit together
            raise InputError(f"objective.{message}") from error
        raise InputError(
            f"objective.{key}: {message[0].lower()}{message[1:]}, not {found['input']!r}"
        ) from error
