"""The configuration of one adapter, with PEFT's field names, defaults and JSON form.

It says which modules are adapted and how; it knows nothing of a particular model. Resolving
`target_modules` against a model is `targets.py`'s work, reading and writing folders
`checkpoint.py`'s.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self

from lorakit import atomic
from lorakit.errors import InputError, did_you_mean
from lorakit.lora.init import ChosenInit, as_settings, find, registered
from lorakit.lora.init.corda import CordaConfig
from lorakit.lora.init.eva import EvaConfig
from lorakit.lora.init.lora_ga import LoraGAConfig
from lorakit.lora.locate import CONFIG_NAME, locate
from lorakit.lora.patterns import TimeLeft, check, first_match
from lorakit.lora.peft_fields import (
    CarriedFields,
    PeftType,
    TaskType,
    as_meant,
    is_inert,
    whole,
)

_HIGHEST_RANK = 1 << 20


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _are_layers(value: object) -> bool:
    indices = value if isinstance(value, list) else [value]
    return value is None or all(type(index) is int for index in indices)


def _are_tokens(value: object) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return value is None or all(
        isinstance(tokens, (list, tuple)) and all(type(token) is int for token in tokens)
        for tokens in lists
    )


_RULES: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
    (("lora_dropout",), lambda value: _is_number(value) and 0 <= value < 1, "in [0, 1)"),
    (
        ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"),
        lambda value: value in (True, False, None),
        "true or false",
    ),
    (("bias",), lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    (
        ("target_modules", "exclude_modules", "layers_pattern"),
        lambda value: isinstance(value, str) or _are_names(value),
        "a list of names or a text",
    ),
    (("modules_to_save", "target_parameters"), _are_names, "a list of names"),
    (("layers_to_transform",), _are_layers, "indices of layers"),
    (
        ("trainable_token_indices",),
        _are_tokens,
        "numbers of tokens, or lists of them by the embedding's name",
    ),
    (
        ("base_model_name_or_path",),
        lambda value: isinstance(value, (str, Path, NoneType)),
        "a text",
    ),
]
"""What the values of fields must be, and how a message says it."""


@dataclass(kw_only=True)
class LoraConfig(CarriedFields):
    """How one adapter is built: `W' = W + scaling * B A` (Hu et al. 2021, arXiv:2106.09685).

    Args:
        peft_type: `LORA`.
        r: the rank, the number of rows of `A` and columns of `B`.
        target_modules: names (suffixes of module paths), one regular expression over the whole
            path, or a preset: `attention-minimal` (query and value), `attention` (query, key,
            value and output) or `all-linear`. None means `attention-minimal`.
        exclude_modules: names or a regular expression that are left out again.
        lora_alpha: the numerator of the scaling, `lora_alpha / r`.
        lora_dropout: the share of the adapter's input that is dropped while training.
        fan_in_fan_out: carried along; every layer knows itself how its weight is stored.
        bias: which biases of the base are trained: `none`, `all`, or `lora_only`.
        use_rslora: scale by `lora_alpha / sqrt(r)` (Kalajdzievski 2023, arXiv:2312.03732).
        modules_to_save: modules that are trained whole and saved with the adapter.
        init_lora_weights: True (`A` Kaiming uniform, `B` zero), `gaussian`, `orthogonal`, `pissa`
            or `pissa_niter_4` (the principal part of W), `olora`, `loftq` (W is quantised, and the
            adapter starts from what that loses), `mica` (`B` is minor directions of W and is not
            trained), False (both random, so that the adapter is not the identity: for tests), or
            from data: `eva`, `corda`, `lora_ga` (`init_from_data.py`). Each is in `init/`.
        layers_to_transform: indices of the layers that are adapted; None means all.
        layers_pattern: the name of the list that holds the layers, when it cannot be guessed.
        rank_pattern, alpha_pattern: `r` and `lora_alpha` for single modules, by suffix or
            regular expression.
        use_dora: train the magnitude of every output's weight apart from its direction (Liu et
            al. 2024, arXiv:2402.09353).
        lora_bias: give `B` a bias.
        target_parameters: paths of parameters that are adapted themselves, such as the experts
            of a mixture, (experts, d_in, d_out).
        trainable_token_indices: ids of tokens whose embeddings are trained, or a list of them by
            embedding's name.
        layer_replication: ranges [from, to) of layers that the model is built from anew, with
            the weights shared and an adapter for each.
        ensure_weight_tying: a head that is tied to an adapted embedding is adapted with it.
        loftq_config, eva_config, corda_config, lora_ga_config: settings of these initialisations,
            as in PEFT; a dictionary becomes an `EvaConfig` and so on.
        runtime_config: as in PEFT; never saved.
        other_fields: fields of a file that neither PEFT 0.21 nor lorakit knows, carried along.

    Raises:
        InputError: a value is out of range, or asks for what lorakit does not do.
    """

    peft_type: str = PeftType.LORA
    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    ensure_weight_tying: bool = False
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    runtime_config: Any = None
    other_fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.time_left = TimeLeft()  # for its patterns; no field, as it is not written
        if str(self.peft_type).upper() != PeftType.LORA:
            raise InputError(f"peft_type is {self.peft_type}, and lorakit has LORA only")
        self.peft_type = PeftType.LORA
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        for name in (
            "target_modules",
            "exclude_modules",
            "modules_to_save",
            "layers_to_transform",
        ):
            value = getattr(self, name)
            if isinstance(value, (set, tuple, frozenset)):  # PEFT accepts and keeps sets
                setattr(self, name, sorted(value))
        for kind in registered():
            value = getattr(self, kind.field) if kind.field else None
            if value is None or kind.field == "loftq_config":  # a dictionary, in PEFT's files too
                continue
            if not isinstance(value, dict) and not dataclasses.is_dataclass(value):
                raise InputError(f"{kind.field} must be a dictionary of settings, not {value!r}")
            if isinstance(value, dict) and kind.settings:
                setattr(self, kind.field, as_settings(kind.settings, kind.field, value))
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        if self.task_type is not None:
            self.task_type = getattr(self.task_type, "value", self.task_type)  # PEFT's TaskType
            if self.task_type not in list(TaskType):
                raise InputError(f"task_type must be one of {', '.join(TaskType)}")
        self.r = whole(self.r)
        if isinstance(self.rank_pattern, dict):
            self.rank_pattern = {name: whole(r) for name, r in self.rank_pattern.items()}
        for rank in (self.r, *self.rank_pattern.values()):
            if type(rank) is not int or rank < 1:
                raise InputError(f"r must be a whole number of at least 1, not {rank!r}")
            if rank > _HIGHEST_RANK:
                raise InputError(f"r is {rank}, more than any layer has")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not _is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
                raise InputError(f"lora_alpha must be a number above 0, not {alpha!r}")
        for names, fits, words in _RULES:
            for name in names:
                if not fits(value := getattr(self, name)):
                    raise InputError(f"{name} must be {words}, not {value!r}")
        find(self.init_lora_weights)
        for name in ("rank_pattern", "alpha_pattern", "layers_pattern"):
            patterns = getattr(self, name) or []
            for pattern in [patterns] if isinstance(patterns, str) else patterns:
                try:
                    check(pattern)
                except InputError as error:
                    raise InputError(f"{name}: {error}") from error
        if self.target_modules in ("", []) and not self.target_parameters:
            raise InputError("target_modules is empty: name modules, or use 'all-linear'")
        if getattr(self.runtime_config, "ephemeral_gpu_offload", False):
            raise InputError("runtime_config: ephemeral_gpu_offload is not supported by lorakit")
        self.check_carried()
        plain = self.init_lora_weights in (True, False)
        if self.lora_bias and (self.use_dora or not plain):
            raise InputError(
                "The argument lora_bias=True is for use_dora=False and init_lora_weights=True"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError("layers_pattern needs layers_to_transform")
        if self.target_parameters and (self.lora_dropout or self.lora_bias or self.use_dora):
            raise InputError(
                "target_parameters has no input of its own: set lora_dropout=0, lora_bias=False "
                "and use_dora=False"
            )

    @property
    def init(self) -> ChosenInit:
        """The initialisation that `init_lora_weights` names, with its settings."""
        kind = find(self.init_lora_weights)
        if kind.settings is None:
            return ChosenInit(kind, self.init_lora_weights)
        settings: Any = as_settings(kind.settings, kind.field, getattr(self, kind.field))
        return ChosenInit(kind, self.init_lora_weights, settings)

    def rank_for(self, module_name: str) -> int:
        """The rank of the module at this path: `rank_pattern`'s first match, or `r`."""
        key = first_match(self.rank_pattern, module_name, self.time_left)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_for(self, module_name: str) -> float:
        """The alpha of the module at this path: `alpha_pattern`'s first match, or `lora_alpha`."""
        key = first_match(self.alpha_pattern, module_name, self.time_left)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def scaling_for(self, module_name: str) -> float:
        """The factor before `B A` at this path: `alpha / r`, or `alpha / sqrt(r)` (rsLoRA)."""
        r, alpha = self.rank_for(module_name), self.alpha_for(module_name)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def with_ranks(
        self,
        ranks: Mapping[str, int],
        alphas: Mapping[str, float] | None = None,
        **changes: Any,
    ) -> Self:
        """A copy whose modules have these ranks and alphas, by path, and `changes` of other fields.

        `r` and `lora_alpha` are those in `changes`, or the most frequent; each module with another
        value gets a pattern that means its path alone.

        Args:
            alphas: None makes every scaling 1.
        """
        if alphas is None:
            alphas, changes = ranks, {"use_rslora": False, **changes}
        for name, patterns, values in (
            ("r", "rank_pattern", ranks),
            ("lora_alpha", "alpha_pattern", alphas),
        ):
            usual = changes.get(name) or Counter(values.values()).most_common(1)[0][0]
            others = {f"^{re.escape(p)}": one for p, one in values.items() if one != usual}
            changes |= {name: usual, patterns: others}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT writes them to `adapter_config.json`, those carried along included."""
        values = dataclasses.asdict(self)
        other = values.pop("other_fields")
        del values["runtime_config"]
        return dict(sorted({**other, **values}.items()))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = CONFIG_NAME) -> Self:
        """Builds a configuration from PEFT's JSON form, of any PEFT version.

        Raises:
            InputError: it is not LoRA, or an active field is unknown here (ignoring it would
                silently give another model).
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"other_fields", "runtime_config"}
        usual = cls()
        values = as_meant(values, {name: getattr(usual, name) for name in known})
        other = {k: v for k, v in values.items() if k not in known and k != "runtime_config"}
        for name, value in other.items():
            if is_inert(name, value):
                continue
            if value:
                raise InputError(
                    f"{where}: {name}={value!r} is not supported by lorakit"
                    f"{did_you_mean(name, known)}"
                )
            warnings.warn(f"{where}: lorakit does not know {name}, which is not set", stacklevel=3)
        try:
            return cls(**{k: v for k, v in values.items() if k in known}, other_fields=other)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except (TypeError, AttributeError) as error:
            raise InputError(f"{where}: a field has the wrong type: {error}") from error

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """The configuration in a file.

        Raises:
            InputError: it cannot be read, or not be used.
        """
        path = Path(path)
        try:
            values: Any = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise InputError(f"{path} is not readable JSON: {error}") from error
        if not isinstance(values, dict):
            raise InputError(f"{path} must hold one JSON object")
        return cls.from_dict(values, where=str(path))

    @classmethod
    def from_pretrained(
        cls, model_id: str | Path, subfolder: str | None = None, **options: Any
    ) -> Self:
        """The configuration of the adapter in a folder, or of a hub's id.

        Args:
            options: fields that take the place of the file's, and `revision`, `token`,
                `cache_dir`, … for the hub.

        Raises:
            InputError: there is no adapter, or its configuration cannot be used.
        """
        names = {f.name for f in dataclasses.fields(cls)} - {"revision"}
        fields = {name: options.pop(name) for name in names & options.keys()}
        folder = locate(model_id, subfolder, **options)
        if not (folder / CONFIG_NAME).is_file():
            raise InputError(f"{folder} holds no adapter: there is no {CONFIG_NAME} in it")
        return dataclasses.replace(cls.from_json_file(folder / CONFIG_NAME), **fields)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes `adapter_config.json` into a folder, which is made if it is missing."""
        atomic.write_file(Path(save_directory) / CONFIG_NAME, self.to_json())

    def to_json(self, **changes: Any) -> str:
        """`to_dict` with `changes`, as the text of `adapter_config.json`."""
        return json.dumps(self.to_dict() | changes, indent=2, ensure_ascii=False) + "\n"
