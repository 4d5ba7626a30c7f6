"""What a recipe leaves out, chosen by objective, model size and rows; with the reason.

Rank and alpha are `recommended_config`'s; learning rates and epochs are the objective's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.lora.recommend import recommended_config, size_class

if TYPE_CHECKING:
    from lorakit.training.recipe import Recipe

_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # the newer name first


@dataclass(frozen=True)
class Advice:
    """A key of the recipe that was left out, the value that it got, and why."""

    key: str
    value: Any
    why: str

    @property
    def line(self) -> str:
        """The advice as one line."""
        return f"{self.key}={self.value}: {self.why}"


def advised(recipe: Recipe, parameters: int, rows: int) -> tuple[Recipe, list[Advice]]:
    """`recipe` with what it leaves out filled in, and what that was.

    Args:
        parameters: of the base model.
        rows: to learn from.
    """
    objective, size = recipe.make_objective(), size_class(parameters)
    given, task = recipe.training.model_fields_set, objective.recommended_for
    r = recipe.lora.get("r", recommended_config(task, size).r)
    advice = []
    if "r" not in recipe.lora:
        advice.append(Advice("lora.r", r, f"recommended for {task} with a {size} model"))
    if "lora_alpha" not in recipe.lora:
        advice.append(Advice("lora.lora_alpha", 2 * r, "twice the rank"))
    if "learning_rate" not in given:
        why = f"usual for a {size} model ({parameters:,} parameters)"
        advice.append(Advice("training.learning_rate", objective.learning_rates[size], why))
    if not {"num_train_epochs", "max_steps"} & given:
        epochs = next((epochs for below, epochs in objective.epochs if rows < below), 1)
        why = f"{rows:,} rows are seen {epochs} time{'s' * (epochs > 1)}"
        advice.append(Advice("training.num_train_epochs", epochs, why))
    if recipe.quantization and not given & {*_CHECKPOINTING}:
        from transformers import TrainingArguments

        why = "usual beside a quantised base; false is faster and takes more memory"
        name = next(name for name in _CHECKPOINTING if hasattr(TrainingArguments, name))
        advice.append(Advice(f"training.{name}", True, why))
    return recipe.filled_in({a.key: a.value for a in advice}), advice
