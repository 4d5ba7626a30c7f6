"""The recipe's `eval`: what an evaluation takes beside the held-out loss, read strictly."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lorakit.evaluation.metrics import METRICS, check_metrics

_Count = Annotated[int, Field(ge=1, lt=2**31, strict=True)]


class GenerateSettings(BaseModel):
    """The recipe's `eval.generate`.

    Attributes:
        rows: how many held-out prompts are answered, the first ones.
        metrics: names in `evaluation.metrics.METRICS`.
        max_new_tokens: the most tokens of an answer.
        batch_size: prompts at a time.
    """

    model_config = ConfigDict(extra="forbid")

    rows: _Count = 64
    metrics: Annotated[list[str], Field(min_length=1)] = ["rouge"]
    max_new_tokens: _Count = 256
    batch_size: _Count = 16

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        check_metrics(names, METRICS)
        return [*dict.fromkeys(names)]


class EvaluationRecipe(BaseModel):
    """The recipe's `eval`: what an evaluation takes beside the held-out loss."""

    model_config = ConfigDict(extra="forbid")

    generate: GenerateSettings | None = None
