"""An adapter and its bare base model side by side, on the same rows.

The numbers come from `metrics` and `loss`, the answers from `answers`; here rows that repeat a
prompt are joined, so that each prompt is answered once and scored against all its references.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.formats import Message, Sample
from lorakit.errors import InputError
from lorakit.evaluation.answers import generate_answers
from lorakit.evaluation.loss import mean_loss
from lorakit.evaluation.metrics import METRICS, check_metrics
from lorakit.evaluation.seq2seq import generate_targets, mean_target_loss
from lorakit.models.inside import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.lora import LoraModel


@dataclass(frozen=True)
class Example:
    """One prompt: what was asked, what was wanted, and the two answers."""

    prompt: list[Message]
    references: list[str]
    base: str
    tuned: str


@dataclass(frozen=True)
class Evaluation:
    """Scores by metric, each of the bare base and of the tuned model.

    `rows` counts samples, `prompts` different prompts: rows that repeat a prompt are further
    references for it. `examples` is empty when only the loss was asked for. `seconds` is wall
    time.
    """

    rows: int
    prompts: int
    scores: dict[str, dict[str, float]]
    examples: list[Example]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain JSON types."""
        return asdict(self)


def evaluate(
    model: LoraModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    *,
    metrics: Sequence[str] = ("exact_match", "bleu", "rouge", "loss"),
    max_new_tokens: int = 256,
    batch_size: int = 16,
    max_length: int = 1024,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores the model with its active adapters, and without any, on `samples`.

    Args:
        metrics: names in `METRICS`, and `loss` (nats per supervised token).
        max_new_tokens: at most so many tokens an answer.
        batch_size: rows at a time.
        max_length: tokens of a row that the loss is taken on.
        on_progress: called with how much of how much is done, in answers and rows.

    Raises:
        InputError: there are no samples, a metric is unknown, or plain text is to be answered.
    """
    check_metrics(metrics)
    by_answers = [name for name in metrics if name in METRICS]
    _check_samples(samples, by_answers)
    began = time.perf_counter()
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt_key, []).append(sample)
    asked = [group[0] for group in groups.values()] if by_answers else []
    prompts = [sample.prompt for sample in asked]
    references = [[s.reference for s in group] for group in groups.values()] if by_answers else []

    encoder_decoder = base_model(model).config.is_encoder_decoder
    loss_of = mean_target_loss if encoder_decoder else mean_loss
    done, whole = 0, 2 * (len(prompts) + ("loss" in metrics) * len(samples))

    def count(finished: int) -> None:
        nonlocal done
        done += finished
        if on_progress:
            on_progress(done, whole)

    def score() -> tuple[list[str], dict[str, float]]:
        """Answers and scores of the model as it is now."""
        options: Any = {
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "on_batch": count,
        }
        if encoder_decoder:
            answers = generate_targets(model, tokenizer, asked, **options)
        else:
            answers = generate_answers(
                model, tokenizer, prompts, tools=[s.tools for s in asked], **options
            )
        scores = {name: METRICS[name](answers, references) for name in by_answers}
        if "loss" in metrics:
            scores["loss"] = loss_of(
                model, tokenizer, samples, max_length, batch_size, on_batch=count
            )
        return answers, scores

    tuned_answers, tuned = score()
    with model.disable_adapter():
        base_answers, base = score()
    return Evaluation(
        rows=len(samples),
        prompts=len(groups),
        scores={name: {"base": base[name], "tuned": tuned[name]} for name in metrics},
        examples=[
            Example(*example)
            for example in zip(prompts, references, base_answers, tuned_answers, strict=True)
        ],
        seconds=round(time.perf_counter() - began, 2),
    )


def _check_samples(samples: Sequence[Sample], by_answers: Sequence[str]) -> None:
    if not samples:
        raise InputError("there are no rows to evaluate: give a file that has some")
    plain = next((s for s in samples if s.text is not None), None)
    if by_answers and plain is not None:
        raise InputError(
            f"{plain.where} is plain text, which {by_answers[0]} cannot score: "
            "use --metrics loss, or rows with an answer"
        )
