"""The recipe: everything that decides a training run, read strictly.

A recipe is YAML (or a mapping), every value can be overridden by its dotted name, and a key that
nothing reads is an error. Names under `lora` are PEFT's, under `training` those of
`TrainingArguments`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorakit.errors import InputError, did_you_mean

# Decided elsewhere in the recipe, or by the trainer itself.
_RESERVED = {
    "output_dir": "output_dir at the top of the recipe",
    "bf16": "dtype at the top of the recipe",
    "fp16": "dtype at the top of the recipe",
    "torch_compile": "compile at the top of the recipe",
    "remove_unused_columns": "nothing: the trainer builds its own batches",
    "group_by_length": "nothing: where rows are padded, those of like length share a batch",
    "train_sampling_strategy": "nothing: where rows are padded, those of like length share a batch",
    "auto_find_batch_size": "training.per_device_train_batch_size",
    "dataloader_drop_last": "nothing: every row is learned",
    "average_tokens_across_devices": "nothing: the loss is always that of all processes' tokens",
    "resume_from_checkpoint": "--resume",
    "data_seed": "training.seed",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class DataRecipe(_Strict):
    """Which rows are learned, and which are held out."""

    train: str
    eval: Annotated[float, Field(ge=0, lt=1)] | str = 0.1
    max_length: Annotated[int, Field(ge=2)] = 1024
    columns: dict[str, str] = {}
    limit: Annotated[int, Field(ge=1)] | None = None
    padding_free: bool = True
    packing: bool = False

    @model_validator(mode="after")
    def _packing_is_padding_free(self) -> Self:
        if self.packing and not self.padding_free:
            raise ValueError("data.packing puts rows in one line: leave data.padding_free on")
        return self


class TrainingRecipe(BaseModel):
    """`TrainingArguments`, by their own names. Those listed here have lorakit's defaults."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    max_steps: int = -1
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    per_device_eval_batch_size: Annotated[int, Field(ge=1)] = 8
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    logging_steps: Annotated[float, Field(gt=0)] = 5
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: Annotated[float, Field(gt=0)] = 0.2
    save_total_limit: Annotated[int, Field(ge=1)] | None = 2
    report_to: str | list[str] = "none"
    seed: Annotated[int, Field(ge=0)] = 42

    @model_validator(mode="after")
    def _only_training_arguments(self) -> Self:
        extra = self.model_extra or {}
        for name in extra:
            if name in _RESERVED:
                raise ValueError(f"training.{name} is not set here: use {_RESERVED[name]}")
        if extra:
            import dataclasses

            from transformers import TrainingArguments

            known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
            for name in extra:
                if name not in known:
                    raise ValueError(
                        f"training.{name} is not a recipe key{did_you_mean(name, known)}"
                    )
        return self


class Recipe(_Strict):
    """A training run: the base model, the rows, the adapter, and the optimisation."""

    model: str
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    data: DataRecipe
    lora: dict[str, Any] = {}
    training: TrainingRecipe = TrainingRecipe()
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    samples: Annotated[int, Field(ge=0)] = 3
    output_dir: str

    @model_validator(mode="after")
    def _only_lora_fields(self) -> Self:
        self.lora = {"target_modules": "all-linear", **self.lora}
        self.lora_config()
        if self.task_type != "CAUSAL_LM":
            for key, given in (("data.packing", self.data.packing), ("compile", self.compile)):
                if given is True:
                    raise ValueError(
                        f"{key} is for causal language models: leave it out with "
                        f"lora.task_type {self.task_type}"
                    )
        return self

    @model_validator(mode="after")
    def _something_to_stop_by(self) -> Self:
        if self.early_stopping_patience and (
            self.data.eval == 0 or self.training.eval_strategy == "no"
        ):
            raise ValueError(
                "early_stopping_patience goes by the held-out loss: "
                "leave data.eval above 0 and training.eval_strategy on"
            )
        return self

    @property
    def task_type(self) -> str:
        """PEFT's name of the task: `lora.task_type`, or `CAUSAL_LM`."""
        return str(self.lora.get("task_type") or "CAUSAL_LM")

    def filled_in(self, values: Mapping[str, Any]) -> Recipe:
        """This recipe with the values of some dotted keys."""
        return load_recipe(self.to_dict(), values.items())

    def lora_config(self) -> Any:
        """The adapter's `LoraConfig`. Raises InputError for a wrong key or value."""
        import dataclasses

        from lorakit.lora.config import LoraConfig
        from lorakit.models.load import FORMS

        known = {f.name for f in dataclasses.fields(LoraConfig)}
        known -= {"other_fields", "inference_mode", "base_model_name_or_path", "revision"}
        for name in self.lora:
            if name not in known:
                raise InputError(f"lora.{name} is not a recipe key{did_you_mean(name, known)}")
        if self.task_type not in FORMS:
            near = did_you_mean(self.task_type.upper(), FORMS)
            raise InputError(
                f"lora.task_type cannot be {self.task_type}{near}: lorakit trains "
                f"{', '.join(FORMS)}"
            )
        try:
            return LoraConfig(
                **{"r": 16, "lora_alpha": 32, **self.lora, "task_type": self.task_type}
            )
        except InputError as error:
            raise InputError(f"lora: {error}") from error
        except TypeError as error:
            raise InputError(f"lora: a value has the wrong type ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults included, as plain JSON types."""
        return self.model_dump(mode="json")


def load_recipe(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Iterable[str | tuple[str, Any]] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Recipe:
    """Reads a recipe and applies overrides.

    Args:
        source: a YAML file, a mapping with the same keys, or None when overrides say it all.
        overrides: `dotted.key=value`, whose value is read as YAML (`lora.r=16`), or a pair of a
            dotted key and a value that is taken as it is.
        defaults: values of keys at the top that neither of the two gives.

    Raises:
        InputError: one line that names the file, the key, and the nearest valid key.
    """
    where = str(source) if isinstance(source, (str, Path)) else "recipe"
    if isinstance(source, (str, Path)):
        values = _read_yaml(Path(source))
    else:
        values = {k: dict(v) if isinstance(v, Mapping) else v for k, v in (source or {}).items()}
    for override in overrides:
        _apply(values, override)
    values = {**(defaults or {}), **values}
    try:
        return Recipe.model_validate(values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except ValidationError as error:
        # A union reports each of its branches: the first finding for a key says enough.
        problems = {".".join(_field_names(_path(e))): _problem(e) for e in reversed(error.errors())}
        raise InputError(f"{where}: {'; '.join(reversed(problems.values()))}") from error


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `1e-4` is a number, and no key stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise InputError(f"line {line}: the key '{key}' stands twice")
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"the recipe {path} {kind}")
    if path.suffix in (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"):
        raise InputError(f"{path} is data and not a recipe: give it with --data, or as data.train")
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys (model, data, lora, training, …)")
    return values


def _parse_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or "not valid"
        raise InputError(f"not valid YAML: {at}{problem}") from error
    except (RecursionError, ValueError) as error:
        raise InputError(f"not valid YAML: {error}") from error


def _apply(values: dict[str, Any], override: str | tuple[str, Any]) -> None:
    if isinstance(override, str):
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"'{override}' is not an override: write key=value, as in lora.r=16")
        try:
            value = _parse_yaml(text)
        except InputError as error:
            raise InputError(f"{override}: {error}") from error
    else:
        key, value = override
    *sections, last = key.split(".")
    place = values
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(f"{key}: '{section}' is a value, it has no keys below it")
        place = inner
    place[last] = value


def _problem(error: Any) -> str:
    """One line for one of pydantic's findings."""
    names = _field_names(_path(error))
    key = ".".join(names)
    if error["type"] == "extra_forbidden":
        section = ".".join(names[:-1])
        known = _known_keys(section)
        return f"{key} is not a recipe key{did_you_mean(names[-1], known)}"
    if error["type"] == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    return f"{key}: {message[0].lower()}{message[1:]}, not {error['input']!r}"


def _path(error: Any) -> list[str]:
    return [str(part) for part in error["loc"]]


def _field_names(path: list[str]) -> list[str]:
    """The recipe's own keys of an error's path, without the names of a union's branches."""
    names: list[str] = []
    fields: Any = Recipe.model_fields
    for part in path:
        names.append(part)
        annotation = fields[part].annotation if part in fields else None
        inner = annotation if isinstance(annotation, type) else None
        if inner is None or not issubclass(inner, BaseModel):
            break
        fields = inner.model_fields
    return names


def _known_keys(section: str) -> list[str]:
    if not section:
        return list(Recipe.model_fields)
    annotation = Recipe.model_fields[section].annotation
    kinds = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
    return [n for k in kinds if issubclass(k, BaseModel) for n in k.model_fields]
