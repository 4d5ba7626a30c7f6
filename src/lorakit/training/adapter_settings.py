"""The `LoraConfig` of a run's adapter: the recipe's, fitted to the model and to what was read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.lora.presets import with_parts

if TYPE_CHECKING:
    from lorakit.lora.config import LoraConfig
    from lorakit.objectives.objective import TrainingInputs
    from lorakit.training.recipe import Recipe


def adapter_config(recipe: Recipe, inputs: TrainingInputs) -> LoraConfig:
    """The recipe's `LoraConfig`, with new modules trained whole, and the rows of new tokens."""
    config: LoraConfig = recipe.lora_config()
    config.target_modules = with_parts(
        config.target_modules, recipe.lora.get("parts"), inputs.model, inputs.has_pictures
    )
    if inputs.token_rows:
        whole = config.modules_to_save or []
        rows = {
            path: tokens
            for path, tokens in inputs.token_rows.items()
            if path.rpartition(".")[2] not in whole and path not in whole
        }
        config.trainable_token_indices = rows or None
    if inputs.new_modules:
        own = config.modules_to_save or []
        config.modules_to_save = list(dict.fromkeys([*own, *inputs.new_modules]))
    return config
