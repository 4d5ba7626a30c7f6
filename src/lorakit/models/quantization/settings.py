"""The setting `quantization`: how a base model is quantised while it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError, did_you_mean
from lorakit.models.quantization.backend import by_type

if TYPE_CHECKING:
    import torch

UNQUANTIZED = "none"
"""The value for a base that is not quantised, where an adapter's record says otherwise."""

_COMPUTE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Quantization:
    """How the weights of a base model's linear layers are stored.

    Args:
        type: a type of one of the registered backends: `nf4`, `fp4`, `int8`.
        double_quantization: whether the scales of 4-bit weights are quantised too; None is yes.
        compute_dtype: of products with 4-bit weights; None is the model's dtype.
    """

    type: str
    double_quantization: bool | None = None
    compute_dtype: str | None = None

    def __post_init__(self) -> None:
        known = by_type()
        if self.type not in tuple(known):
            near = did_you_mean(str(self.type), known)
            raise InputError(f"quantization: {self.type!r} is not one of {', '.join(known)}{near}")
        if self.double_quantization not in (None, True, False):
            raise InputError("quantization.double_quantization should be true or false")
        if self.compute_dtype not in (None, *_COMPUTE_DTYPES):
            raise InputError(
                f"quantization.compute_dtype should be one of {', '.join(_COMPUTE_DTYPES)}, not "
                f"{self.compute_dtype!r}"
            )
        if refused := [name for name in self.options if name not in known[self.type].options]:
            takers = [t for t, backend in known.items() if refused[0] in backend.options]
            raise InputError(
                f"quantization: {' and '.join(refused)} is for {', '.join(takers)}: leave them out "
                f"with {self.type}"
            )

    @property
    def options(self) -> dict[str, Any]:
        """The settings given beside the type."""
        return {n: value for n, value in vars(self).items() if n != "type" and value is not None}

    def __str__(self) -> str:
        once = ", scales as they are" if self.double_quantization is False else ""
        return self.type + once + (f", computed in {self.compute_dtype}" * bool(self.compute_dtype))


def as_quantization(value: Any) -> Quantization | None:
    """The setting from a recipe or a user: a type, or a mapping with the fields of `Quantization`.

    Raises:
        InputError: it is something else.
    """
    if value is None or isinstance(value, Quantization) or value == UNQUANTIZED:
        return None if value == UNQUANTIZED else value
    if isinstance(value, str):
        return Quantization(value)
    if not isinstance(value, Mapping):
        raise InputError(
            f"quantization should be one of {', '.join(by_type())}, or a mapping with type and "
            f"double_quantization, not {value!r}"
        )
    known = [field.name for field in fields(Quantization)]
    for key in value:
        if key not in known:
            raise InputError(f"quantization.{key} is not a key{did_you_mean(str(key), known)}")
    if "type" not in value:
        raise InputError(f"quantization.type is missing: give one of {', '.join(by_type())}")
    return Quantization(**value)


def loading_options(
    quantization: Quantization | None, dtype: torch.dtype, device: str, whole: Sequence[str] = ()
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that quantise a model while it is loaded.

    Args:
        whole: modules to leave unquantised, beside those that transformers leaves.

    Raises:
        InputError: the backend's package is not installed, or it has no such dtype.
    """
    import torch

    if quantization is None:
        return {}
    if dtype == torch.float64:
        raise InputError("quantization has no float64: give another dtype")
    kind = quantization.type
    config = by_type()[kind].config(kind, dtype, list(whole), **quantization.options)
    return {"quantization_config": config, "device_map": {"": device}}
