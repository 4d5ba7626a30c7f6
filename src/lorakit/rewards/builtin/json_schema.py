"""Whether a completion is JSON that a schema allows (the library jsonschema)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lorakit.rewards.builtin.json_text import json_value
from lorakit.rewards.completion_text import text_of


@dataclass(frozen=True)
class JsonSchema:
    """1 where the completion is valid against the schema, else 0; None for a row without one.

    Attributes:
        schema: a JSON schema, as a mapping, or the path of a `.json` file with it.
        column: with a schema for each row, as an object or as text, in place of `schema`.
        fenced: it may stand between Markdown's fences.
    """

    schema: Mapping[str, Any] | str | None = None
    column: str | None = None
    fenced: bool = False
    main: ClassVar[str] = "schema"

    def __post_init__(self) -> None:
        if (self.schema is None) == (self.column is None):
            raise ValueError("give a schema, or the column that has one for each row")
        if self.schema is not None:
            _validator(self._own())

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        if self.column is None:
            validators = [_validator(self._own())] * len(completions)
        else:
            validators = [
                None if schema is None else _validator(_read(schema))
                for schema in columns[self.column]
            ]
        return [
            None if validator is None else self._score(text_of(completion), validator)
            for completion, validator in zip(completions, validators, strict=True)
        ]

    def _score(self, text: str, validator: Any) -> float:
        valid, value = json_value(text, self.fenced)
        return float(valid and validator.is_valid(value))

    def _own(self) -> Mapping[str, Any] | bool:
        if isinstance(self.schema, str):
            try:
                return _read(Path(self.schema).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"schema: {self.schema} cannot be read: {error}") from error
        return _read(self.schema)


def _read(schema: Any) -> Mapping[str, Any] | bool:
    if isinstance(schema, str):
        schema = json.loads(schema)
    if not isinstance(schema, (Mapping, bool)):
        raise ValueError(f"the schema is {schema!r}, no object")
    return schema


def _validator(schema: Mapping[str, Any] | bool) -> Any:
    """What validates by the schema; other documents that it refers to are not fetched."""
    try:
        from jsonschema import SchemaError, validators
        from referencing import Registry
    except ImportError as error:
        raise ValueError("it needs the library jsonschema: pip install 'lorakit[rl]'") from error
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"the schema is not valid: {error.message}") from error
    return kind(schema, registry=Registry())
