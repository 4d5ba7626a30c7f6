"""The settings of the initialisations that have some, with PEFT's names and defaults."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lorakit.errors import InputError, listed

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class LoftQConfig:
    """The settings of LoftQ, with PEFT's names and defaults: bits (2, 4, 8) and iterations."""

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass(frozen=True)
class CordaConfig:
    """The settings of CorDA, with PEFT's names and defaults.

    Args:
        cache_file: the finished factors are read from here, or written to it (safetensors).
        covariance_file: the same for the covariances of the inputs.
        corda_method: `ipm` or `kpm`, see `decomposition.corda`.
        verbose, use_float16_for_covariance, prune_temporary_fields: accepted as in PEFT; nothing
            is printed, sums are in float32 and nothing temporary is left on the model.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass(frozen=True)
class LoraGAConfig:
    """The settings of LoRA-GA, with PEFT's names and defaults; see `decomposition.lora_ga`."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16


@dataclass(frozen=True)
class EvaConfig:
    """The settings of EVA, with PEFT's names and defaults.

    Args:
        rho: a module gets at most `rho * r` of the ranks; 1 leaves every module its own.
        tau: a component has settled when the cosine to its last value is at least this.
        use_label_mask: leave out tokens whose label is `label_mask_value`.
        whiten: divide the components by the roots of their singular values.
        adjust_scaling_factors: the caller is to multiply alpha by new rank / old rank.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise InputError(f"eva_config: rho must be at least 1, not {self.rho!r}")
        if not 0 <= self.tau <= 1:
            raise InputError(f"eva_config: tau must be between 0 and 1, not {self.tau!r}")


def as_settings(kind: type[Settings], field: str, values: Any) -> Settings:
    """The field of a `LoraConfig`, a dictionary or an object, as an instance of `kind`.

    Raises:
        InputError: there is no such setting.
    """
    if values is not None and not isinstance(values, dict):
        values = dataclasses.asdict(values)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for name in values or {}:
        if name not in known:
            raise InputError(f"{field} has no {name}; it has {listed(known)}")
    return kind(**(values or {}))
