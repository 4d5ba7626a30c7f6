"""What a quantisation backend says of itself; `WeightFormat` has the part that layers ask."""

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
        types: the words by which recipes and `--quantization` ask for it; a base whose files are
            quantised already needs none.
        options: the fields of `Quantization`, beside `type`, that it takes.
    """

    types: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()

    def config(self, type: str, dtype: torch.dtype, whole: list[str], **options: Any) -> Any:
        """transformers' configuration that quantises a model while it is loaded.

        Args:
            type: one of `types`.
            dtype: the model's.
            whole: modules that stay as they are, beside those that transformers leaves alone.
            options: those of `options` that were given.

        Raises:
            InputError: a package is missing.
        """
        raise InputError(f"quantization: {self.name} only reads weights that are quantised already")

    def unpack(self, model: Any) -> Any:
        """`model` with plain weights, in which transformers sees no quantisation."""
        from torch import nn

        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                if format_of(weight):
                    plain = nn.Parameter(dequantized(weight, module), requires_grad=False)
                    setattr(module, name, plain)
        model.hf_quantizer.remove_quantization_config(model)
        return model

    def described(self, settings: Mapping[str, Any]) -> str | None:
        """What `settings`, the configuration in a model's files, say of its weights."""
        return settings.get("quant_type")


def backends() -> list[Backend]:
    """Those that are registered."""
    return [known for known in FORMATS if isinstance(known, Backend)]


def by_type() -> dict[str, Backend]:
    """The backends by the words that ask for them."""
    return {word: backend for backend in backends() for word in backend.types}
