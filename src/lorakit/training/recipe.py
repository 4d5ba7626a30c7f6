"""The recipe: everything that decides a training run, read strictly.

A recipe is YAML (or a mapping), every value can be overridden by its dotted name, and a key that
nothing reads is an error. Names under `lora` are PEFT's, under `training` those of
`TrainingArguments`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorakit.data.mixing import Source
from lorakit.data.too_long import TooLong
from lorakit.errors import InputError
from lorakit.models.quantization.settings import Quantization, as_quantization
from lorakit.objectives.registry import default_objective, make_objective
from lorakit.objectives.settings import UnknownSettingError
from lorakit.training.arguments import ARGUMENTS, refusal
from lorakit.training.effects import check_recipe
from lorakit.training.evaluation_recipe import EvaluationRecipe, GenerateSettings
from lorakit.training.recipe_errors import SECTIONS, in_one_line, key_hint, shown
from lorakit.training.yaml_file import parse_yaml, read_yaml

if TYPE_CHECKING:
    from lorakit.objectives.objective import Objective

_LARGEST = 2**31 - 1

IMAGE_FEATURES_MB = 512
"""MiB of features of pictures that are kept in training, if a recipe does not say."""

_SHORT_FORMS = {"objective": "type", "adapter": "path"}
"""Sections that may be one value, and the key that it stands for."""


def _of_one_line(text: str) -> str:
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in text):
        raise ValueError(f"{text[:80]!r} holds a control character; remove it")
    return text


Name = Annotated[str, Field(min_length=1), AfterValidator(_of_one_line)]
"""A path, or what a model or data set is called."""


def _branch(value: object) -> str:
    """Which of a union is meant, so that an error speaks of that one alone."""
    if isinstance(value, list):
        return "<list>"
    return "<share>" if isinstance(value, (int, float)) else "<name>"


def _no_boolean_weight(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("weight"), bool):
        raise ValueError(f"weight should be a number, not {str(value['weight']).lower()}")
    return value


_Share = Annotated[float, Field(ge=0, lt=1), Tag("<share>")]
_Name = Annotated[Name, Tag("<name>")]
_Item = Annotated[
    _Name | Annotated[Source, BeforeValidator(_no_boolean_weight), Tag("<source>")],
    Discriminator(lambda value: "<name>" if isinstance(value, str) else "<source>"),
]
_List = Annotated[list[_Item], Field(min_length=1), Tag("<list>")]


class _Numbers(BaseModel):
    """True is not taken for 1 here, and neither NaN nor Inf is accepted."""

    model_config = ConfigDict(protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields.get(info.field_name or "")
        if field and isinstance(value, bool) and _is_number(field.annotation):
            raise ValueError(f"should be a number, not {str(value).lower()}")
        return value


class _Strict(_Numbers):
    model_config = ConfigDict(extra="forbid")


class DataRecipe(_Strict):
    """Which rows are learned, and which are held out: by `seed`, or the training's where None."""

    train: Annotated[_Name | _List, Discriminator(_branch)]
    eval: Annotated[_Share | _Name | _List, Discriminator(_branch)] = 0.1
    max_length: Annotated[int, Field(ge=2, le=_LARGEST)] = 1024
    too_long: TooLong = "cut"
    columns: dict[str, str] = {}
    limit: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    padding_free: bool = True
    share_prefixes: bool = True
    packing: bool = False
    streaming: bool = False
    buffer_size: Annotated[int, Field(ge=1, le=2**24)] = 1000
    media_dir: Name | None = None
    fetch_images: bool | Annotated[list[Name], Field(min_length=1)] = False
    image_features_mb: Annotated[int, Field(ge=0, le=_LARGEST)] = IMAGE_FEATURES_MB

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        for item in self.eval if isinstance(self.eval, list) else ():
            if isinstance(item, Source) and item.weight != 1:
                raise ValueError(
                    f"data.eval: {item.path} has a weight, which only data.train knows; remove it"
                )
        if self.packing and not self.padding_free:
            raise ValueError("data.packing puts rows in one line: leave data.padding_free on")
        return self


class AdapterRecipe(_Strict):
    """The adapter that a run starts from.

    `continue` trains its values on, so that its configuration is the run's; `freeze` trains a new
    adapter on top of it.
    """

    path: Name
    mode: Literal["continue", "freeze"] = "continue"


def _as_adapter(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class TrainingRecipe(_Numbers):
    """`TrainingArguments`, by their own names. Those listed here have lorakit's defaults.

    `loraplus_lr_ratio` is none of them: with it `B` learns so many times faster than `A` (LoRA+).
    """

    model_config = ConfigDict(extra="allow")

    num_train_epochs: Annotated[float, Field(gt=0, le=1e6)] = 3.0
    max_steps: Annotated[int, Field(ge=-1, le=_LARGEST)] = -1
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=_LARGEST)] = 8
    per_device_eval_batch_size: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=_LARGEST)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: Annotated[float, Field(ge=0, le=_LARGEST)] = 0.05
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    logging_steps: Annotated[float, Field(gt=0, le=_LARGEST)] = 5
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    save_steps: Annotated[float, Field(gt=0, le=_LARGEST)] = 0.2
    save_total_limit: Annotated[int, Field(ge=1)] | None = 2
    report_to: str | list[str] = "none"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    loraplus_lr_ratio: Annotated[float, Field(gt=0, le=1e6)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_is_a_strategy(cls, values: Any) -> Any:
        """YAML reads `eval_strategy: no` as false."""
        if not isinstance(values, dict):
            return values
        strategies = [name for name in values if str(name).endswith("_strategy")]
        return values | {name: "no" for name in strategies if values[name] is False}

    @field_validator("max_steps")
    @classmethod
    def _some_steps(cls, steps: int) -> int:
        if steps == 0:
            raise ValueError("should be at least 1, or -1 to train all epochs, not 0")
        return steps

    @model_validator(mode="after")
    def _only_training_arguments(self) -> Self:
        if extra := self.model_extra:
            from transformers import TrainingArguments

            types = get_type_hints(TrainingArguments)
            known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
            reasons = [
                refusal(name, value) if name in known else _unknown(name, known)
                for name, value in extra.items()
            ]
            if refused := [reason for reason in reasons if reason]:
                raise ValueError("; ".join(refused))
            for name, value in extra.items():
                _check_argument(f"training.{name}", value, types[name])
        return self


def _unknown(name: str, known: Collection[str]) -> str:
    if name in ARGUMENTS:
        return f"training.{name} is none of the installed transformers: upgrade it, or leave it out"
    hint = key_hint(name, known) or "; known are the fields of TrainingArguments"
    return f"training.{name} is not a recipe key{hint}"


class Recipe(_Strict):
    """A training run: the base model, the rows, the adapter, and the optimisation."""

    model: Name
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    quantization: Annotated[Quantization | None, BeforeValidator(as_quantization)] = None
    compile: bool | Literal["auto"] = "auto"
    adapter: Annotated[AdapterRecipe | None, BeforeValidator(_as_adapter)] = None
    tokens: list[Name] = []
    chat_template: Name | None = None
    data: DataRecipe
    objective: dict[str, Any] | None = None
    lora: dict[str, Any] = {}
    training: TrainingRecipe = TrainingRecipe()
    eval: EvaluationRecipe = EvaluationRecipe()
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    samples: Annotated[int, Field(ge=0)] = 3
    output_dir: Name

    @field_validator("eval", mode="before")
    @classmethod
    def _no_rows(cls, value: Any) -> Any:
        if not isinstance(value, (Mapping, EvaluationRecipe)):
            raise ValueError("eval: use data.eval for held-out rows; eval.generate scores answers")
        return value

    @model_validator(mode="before")
    @classmethod
    def _start_says_the_rest(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("adapter") is None:
            return values
        try:
            adapter = AdapterRecipe.model_validate(_as_adapter(values["adapter"]))
        except ValidationError:
            return values  # as its own field it is refused by name
        from lorakit.training.stages import with_start

        return with_start(values, adapter.path, adapter.mode)

    @field_validator("objective", mode="before")
    @classmethod
    def _known_objective(cls, value: Any) -> Any:
        """A name alone is an objective with its default settings; all of them are recorded."""
        if not isinstance(value, (str, Mapping)):
            return value
        return named_objective(value).to_dict()

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        objective = self.make_objective()
        usual = objective.too_long
        if "too_long" not in self.data.model_fields_set and usual != self.data.too_long:
            self.data = self.data.model_copy(update={"too_long": usual})
        continued = self.adapter is not None and self.adapter.mode == "continue"
        if self.objective is not None:
            wanted = objective.task_type
            given = self.lora.get("task_type") or wanted
            if given != wanted:
                cure = "leave one of them out"
                if continued:
                    cure = "train a new adapter on top of the start (adapter.mode=freeze)"
                raise ValueError(
                    f"objective {self.objective['type']} is for lora.task_type {wanted}, not "
                    f"{given}: {cure}"
                )
            if wanted != "CAUSAL_LM":
                self.lora = {**self.lora, "task_type": wanted}
            if self.objective == default_objective(wanted).to_dict():
                self.objective = None  # as where a recipe does not say
        self.lora = {"target_modules": "all-linear", **self.lora}
        if "parts" in self.lora:
            from lorakit.lora.presets import check_parts

            check_parts(self.lora["parts"], self.lora["target_modules"])
        self.lora_config()
        self._check_lora_types()
        if self.tokens and self.lora.get("trainable_token_indices") and not continued:
            raise ValueError(
                "tokens and lora.trainable_token_indices both say whose rows are trained: name "
                "all of them in tokens"
            )
        check_recipe(self)
        return self

    @property
    def data_seed(self) -> int:
        """What decides which rows are held out, and which ones a weight draws."""
        return self.training.seed if self.data.seed is None else self.data.seed

    @property
    def task_type(self) -> str:
        """PEFT's name of the task: `lora.task_type`, or `CAUSAL_LM`."""
        return str(self.lora.get("task_type") or "CAUSAL_LM")

    def make_objective(self) -> Objective:
        """What is learned: `objective`, or what `lora.task_type` stands for."""
        if self.objective is None:
            return default_objective(self.task_type)
        return make_objective(self.objective)

    def filled_in(self, values: Mapping[str, Any]) -> Recipe:
        """This recipe with the values of some dotted keys."""
        return load_recipe(self.to_dict(), values.items())

    def lora_config(self) -> Any:
        """The adapter's `LoraConfig`. Raises InputError for a wrong key or value."""
        from lorakit.lora.config import LoraConfig

        known = {f.name for f in dataclasses.fields(LoraConfig)}
        known -= {"other_fields", "inference_mode", "base_model_name_or_path", "revision"}
        unknown = [
            f"lora.{name} is not a recipe key"
            + (key_hint(name, known) or "; known are the fields of LoraConfig")
            for name in self.lora
            if name not in known and name != "parts"
        ]
        if unknown:
            raise InputError("; ".join(unknown))
        try:
            return LoraConfig(
                **{"r": 16, "lora_alpha": 32, **_of_config(self.lora), "task_type": self.task_type}
            )
        except InputError as error:
            raise InputError(f"lora: {error}") from error
        except (TypeError, AttributeError) as error:
            self._check_lora_types()
            raise InputError(f"lora: a value should have another type ({error})") from error

    def _check_lora_types(self) -> None:
        """For what the adapter's configuration does not look at itself."""
        from lorakit.lora.config import LoraConfig

        types = get_type_hints(LoraConfig)
        for name, value in _of_config(self.lora).items():
            if not name.endswith("_config"):
                _check_argument(f"lora.{name}", value, types[name])

    def to_dict(self) -> dict[str, Any]:
        """All values, defaults included, as plain JSON types; optional sections where given."""
        optional = ("objective", "adapter", "tokens", "chat_template")
        absent: dict[str, Any] = {name: True for name in optional if not getattr(self, name)}
        if self.eval.generate is None:  # nothing beside the held-out loss
            absent["eval"] = True
        unset = set[str]() if self.data.streaming else {"streaming", "buffer_size"}
        unset |= {name for name in ("media_dir", "fetch_images") if not getattr(self.data, name)}
        if self.data.image_features_mb == IMAGE_FEATURES_MB:
            unset |= {"image_features_mb"}
        if unset:
            absent["data"] = unset
        return self.model_dump(mode="json", exclude=absent)


def named_objective(settings: str | Mapping[str, Any]) -> Objective:
    """`make_objective`; where it lacks a setting, the error says what a recipe has for it."""
    try:
        return make_objective(settings)
    except UnknownSettingError as error:
        if not (hint := key_hint(error.name, ())):
            raise
        if own := re.fullmatch(r": use objective \(its setting (.*)\)", hint):
            hint = f": use {own[1]}"
        line = f"objective.{error.name} is not a setting of {error.objective}{hint}"
        raise InputError(line) from error


def _of_config(lora: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe's `lora` is a field of `LoraConfig`: all but the parts of a model."""
    return {name: value for name, value in lora.items() if name != "parts"}


SECTIONS.update(
    {
        "": frozenset(Recipe.model_fields),
        "training.": frozenset(TrainingRecipe.model_fields),
        "data.": frozenset(DataRecipe.model_fields),
        "eval.": frozenset(EvaluationRecipe.model_fields),
        "eval.generate.": frozenset(GenerateSettings.model_fields),
    }
)


def _is_number(annotation: Any) -> bool:
    """Whether a value of this type is a number, and true or false is none."""
    types = {annotation, *get_args(annotation)}
    types |= {inner for kind in types for inner in get_args(kind)}
    return bool(types & {int, float}) and bool not in types


def _check_argument(name: str, value: Any, annotation: Any) -> None:
    """Refuses a value that is not of the type of the argument `name`; it stays as it is."""
    if isinstance(value, bool) and not _is_number(annotation):
        return  # Trainer takes them for more than it says, as in fsdp=True
    message = "input should be a number"
    if not isinstance(value, bool):
        try:
            TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
            return
        except ValidationError as error:
            message = error.errors()[0]["msg"].lower()
    raise InputError(f"{name}: {message}, not {shown(value)}")


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
        values = read_yaml(Path(source))
    else:
        values = {k: dict(v) if isinstance(v, Mapping) else v for k, v in (source or {}).items()}
    for override in overrides:
        _apply(values, override)
    values = {**(defaults or {}), **values}
    if "sweep" in values:
        raise InputError(f"{where}: the sweep block is for lorakit sweep: remove it, or run that")
    try:
        return Recipe.model_validate(values)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except ValidationError as error:
        raise InputError(f"{where}: {in_one_line(error, Recipe)}") from error


def _apply(values: dict[str, Any], override: str | tuple[str, Any]) -> None:
    if isinstance(override, str):
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise InputError(f"'{override}' is not an override: write key=value, as in lora.r=16")
        try:
            value = parse_yaml(text)
        except InputError as error:
            raise InputError(f"{override}: {error}") from error
    else:
        key, value = override
    *sections, last = key.split(".")
    place = values
    for section in sections:
        inner = place.setdefault(section, {})
        if isinstance(inner, str) and place is values and section in _SHORT_FORMS:
            inner = place[section] = {_SHORT_FORMS[section]: inner}
        if not isinstance(inner, dict):
            raise InputError(f"{key}: '{section}' is a value, it has no keys below it")
        place = inner
    place[last] = value
