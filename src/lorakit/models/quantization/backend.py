"""The contract of a quantisation backend: a weight format that transformers can load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lorakit.errors import InputError
from lorakit.weight_formats import FORMATS, WeightFormat, dequantized, format_of

if TYPE_CHECKING:
    import torch


class Backend(WeightFormat):
    """A weight format that transformers can load.

    Attributes:
        name: transformers' `quant_method` of configurations with it.
        types: its values of `quantization` in recipes and of `--quantization`; none for a backend
            that only reads bases whose files are quantised.
        options: the fields of `Quantization`, beside `type`, that it takes.
    """

    types: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()

    def config(self, type: str, dtype: torch.dtype, whole: list[str], **options: Any) -> Any:
        """transformers' configuration that quantises a model while it is loaded.

        Args:
            type: one of `types`.
            dtype: the model's.
            whole: modules to leave unquantised, beside those that transformers leaves.
            options: those of `options` that were given.

        Raises:
            InputError: a package is missing.
        """
        raise InputError(f"quantization: {self.name} only reads weights that are quantised already")

    def unpack(self, model: Any) -> Any:
        """`model` with unpacked weights, and without transformers' quantiser."""
        from torch import nn

        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if format_of(weight):
                    plain = nn.Parameter(dequantized(weight, module), requires_grad=False)
                    setattr(module, name, plain)
        model.hf_quantizer.remove_quantization_config(model)
        return model

    def described(self, settings: Mapping[str, Any]) -> str | None:
        """The kind of weights by `settings`, the quantisation configuration of a model's files."""
        return settings.get("quant_type")


def backends() -> list[Backend]:
    """The registered backends."""
    return [known for known in FORMATS if isinstance(known, Backend)]


def by_type() -> dict[str, Backend]:
    """The backends by their types."""
    return {word: backend for backend in backends() for word in backend.types}
