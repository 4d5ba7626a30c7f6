"""A model from its files, packed or plain, and the refusal of weights that nothing explains."""

from __future__ import annotations

from typing import Any

from lorakit.errors import InputError
from lorakit.models.layouts.layout import Layout
from lorakit.models.quantization.backend import backends
from lorakit.models.quantization.packed import packed_settings
from lorakit.models.shards import all_tensors
from lorakit.models.skeleton import stored_quantization


def require_known(name: str, method: str) -> None:
    """Raises InputError for quantised weights that would be read as if they were plain ones."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    known = [*AUTO_QUANTIZATION_CONFIG_MAPPING, *(backend.name for backend in backends())]
    if method not in known:
        raise InputError(
            f"model: the weights of {name} are quantised by {method}, which is not read here: give "
            "the model before quantisation, or one quantised in another way"
        )


def _require_plain(layout: Layout, name: str) -> None:
    """Raises InputError for packed weights that no configuration says how to unpack."""
    for tensor, stored in all_tensors(layout.shards()).items():
        if stored.code in ("F8_E4M3", "F8_E5M2", "U8", "I32") and len(stored.shape) > 1:
            raise InputError(
                f"model: {name}: {tensor} is stored as {stored.code}, and config.json has no "
                "quantization_config that says what it means: fetch the model again, or give the "
                "one before quantisation"
            )


def from_files(layout: Layout, form: str, **options: Any) -> tuple[Any, Any]:
    """The model, and what `from_pretrained` tells of its files."""
    if not layout.packing and (packed := packed_settings(layout.config())):
        from lorakit.models.quantization.packed_loading import load_packed

        return load_packed(layout, form, *packed, **options)
    plain = layout.is_native and not layout.packing
    if plain and not stored_quantization(layout.config()) and layout.weight_files():
        _require_plain(layout, str(layout.path))
    loaded: tuple[Any, Any] = layout.model(form, output_loading_info=True, **options)
    return loaded
