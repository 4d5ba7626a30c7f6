"""Settings to begin with, by task and by size of the base model.

The table is that of the document which the project implements: harder tasks and larger models
get a higher rank, and alpha is always twice the rank.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Literal

from lorakit.errors import did_you_mean
from lorakit.lora.config import LoraConfig
from lorakit.lora.parameters import count_parameters

if TYPE_CHECKING:
    from torch import nn

Task = Literal["classification", "generation", "complex_reasoning"]
Size = Literal["small", "medium", "large"]

_RANKS: dict[str, dict[str, int]] = {
    "classification": {"small": 8, "medium": 16, "large": 32},
    "generation": {"small": 16, "medium": 32, "large": 64},
    "complex_reasoning": {"small": 32, "medium": 64, "large": 128},
}
_DEFAULT_RANK = 16

# Parameters of the base from which it counts as medium, and as large.
_MEDIUM, _LARGE = 2_000_000_000, 20_000_000_000


def recommended_config(
    task: Task | str | None = None, model_size: Size | str | int | nn.Module | None = None
) -> LoraConfig:
    """The configuration to begin with; anything that is left out or unknown gives r=16, alpha=32.

    Args:
        task: `classification`, `generation` or `complex_reasoning`.
        model_size: `small`, `medium`, `large`, a number of parameters, or the base model itself
            (small is below 2 billion parameters, large from 20 billion).

    Returns: all linear layers are targeted, and `task_type` follows from the task.
    """
    size = model_size if isinstance(model_size, (str, type(None))) else size_class(model_size)
    for name, known in ((task, _RANKS), (size, _RANKS["generation"])):
        if name is not None and name not in known:
            warnings.warn(
                f"recommended_config knows no '{name}'{did_you_mean(name, known)}, only "
                f"{', '.join(known)}: using r={_DEFAULT_RANK}",
                stacklevel=2,
            )
    r = _RANKS.get(task or "", {}).get(size or "", _DEFAULT_RANK)
    return LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules="all-linear",
        task_type="SEQ_CLS" if task == "classification" else "CAUSAL_LM",
    )


def size_class(model: int | nn.Module) -> Size:
    """How large a base model is, given it or the number of its parameters."""
    parameters = model if isinstance(model, int) else count_parameters(model)[1]
    if parameters < _MEDIUM:
        return "small"
    return "medium" if parameters < _LARGE else "large"
