"""Several adapters on one model at once, each with a weight: the sum of their weighted updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.errors import InputError

if TYPE_CHECKING:
    from lorakit.adapters.open import AdapterFiles
    from lorakit.lora import LoraModel


def check_weights(adapters: Sequence[AdapterFiles], weights: Sequence[float]) -> None:
    """Raises InputError unless each adapter has a weight that it can be multiplied by.

    Where a module, a token or a bias was trained whole, and where lengths were (DoRA), there is no
    update that could be taken by half.
    """
    if len(weights) != len(adapters):
        raise InputError(f"--weights: {len(weights)} numbers for {len(adapters)} adapters")
    for adapter, weight in zip(adapters, weights, strict=True):
        if not -1e6 < weight < 1e6:
            raise InputError(f"--weights: {weight} is no weight")
        if weight == 1:
            continue
        config = adapter.config
        for what, has in (
            ("modules_to_save", config.modules_to_save),
            ("trainable_token_indices", config.trainable_token_indices),
            (f"bias='{config.bias}'", config.bias != "none"),
            ("use_dora", config.use_dora),
        ):
            if has:
                raise InputError(
                    f"--weights: {adapter.folder} has {what}, of which there is no part: "
                    f"give it the weight 1, not {weight}"
                )


def add_others(
    model: LoraModel, adapters: Sequence[AdapterFiles], weights: Sequence[float]
) -> list[str]:
    """Loads all but the first of `adapters`, which is there, and makes all of them active.

    Returns: their names in the model.

    Raises:
        InputError: one does not fit the base, or cannot stand beside the others.
    """
    from lorakit.lora import LoraLayer

    names = ["default", *(f"adapter_{i}" for i in range(1, len(adapters)))]
    for name, adapter in list(zip(names, adapters, strict=True))[1:]:
        model.load_adapter(adapter.folder, name)
    model.set_adapter(names, inference_mode=True)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, weight in zip(names, weights, strict=True):
                layer.set_scale(name, weight)
    return names
