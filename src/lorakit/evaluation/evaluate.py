"""An adapter and its bare base model side by side, on the same rows.

The numbers come from `metrics` and `loss`, the answers from `answers`; here rows that repeat a
prompt are joined, so that each prompt is answered once and scored against all its references. What
is compared is the final answer as the chat template writes it, without end mark and reasoning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.answer_form import answer_form, taught_answer
from lorakit.data.conversations import Message
from lorakit.data.samples import Sample
from lorakit.engine.picture_prompt import prompt_row
from lorakit.engine.rows_at_once import FEW_ROWS
from lorakit.engine.sampling import prompt_text
from lorakit.errors import InputError, each
from lorakit.errors import count as count_of
from lorakit.evaluation.answers import Written, answer_samples
from lorakit.evaluation.held_out import held_out_scores, rows_of
from lorakit.evaluation.metrics import METRICS, check_metrics
from lorakit.models.load import most_tokens, positions_of
from lorakit.models.loaded import base_model
from lorakit.objectives.forward import bare
from lorakit.objectives.registry import default_objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.masking import TokenizedRow
    from lorakit.lora import LoraModel
    from lorakit.objectives.objective import Objective


@dataclass(frozen=True)
class Example:
    """One prompt: what was asked, what was wanted, and the two answers, all without reasoning."""

    prompt: list[Message]
    references: list[str]
    base: str
    tuned: str


@dataclass(frozen=True)
class Evaluation:
    """Scores by metric, each of the bare base and of the tuned model.

    `rows` counts samples, `prompts` different prompts: rows that repeat a prompt are further
    references for it. `examples` is empty when only the loss was asked for. `notices` say what was
    left out of the comparison. `seconds` is wall time.
    """

    rows: int
    prompts: int
    scores: dict[str, dict[str, float]]
    examples: list[Example]
    notices: list[str]
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
    objective: Objective | None = None,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
    max_length: int = 1024,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores the model with its active adapters, and without any, on `samples`.

    Args:
        metrics: names in `METRICS`, and `loss` (nats per supervised token, or the objective's
            loss and scores).
        objective: what the adapter has learned by; None for answers, token by token.
        max_new_tokens: the most tokens of an answer.
        batch_size: rows at a time; None for 16 of the loss, and answers as in `write_answers`.
        max_length: tokens of a row that the loss is taken on.
        on_progress: called with how much of how much is done, in answers and rows.

    Raises:
        InputError: there are no samples, a metric is unknown, plain text is to be answered, or a
            row is too long for `max_length` or for the model.
    """
    check_metrics(metrics)
    by_answers = [name for name in metrics if name in METRICS]
    _check_samples(samples, by_answers)
    began = time.perf_counter()
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt_key, []).append(sample)
    asked = [group[0] for group in groups.values()] if by_answers else []
    encoder_decoder: bool = base_model(model).config.is_encoder_decoder
    wanted = references(tokenizer, groups.values(), not encoder_decoder) if by_answers else []
    # Whatever a row can be refused for is found before the first answer is generated.
    learned_by = objective or default_objective("SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM")
    rows: list[TokenizedRow] = []
    if "loss" in metrics:
        length = most_tokens(model, max_length) if encoder_decoder else max_length
        rows = rows_of(learned_by, tokenizer, samples, length)
    short = [] if encoder_decoder else _check_room(model, tokenizer, asked, max_new_tokens)
    done, whole = 0, 2 * (len(asked) + len(rows))

    if on_progress:
        on_progress(0, whole)

    def count(finished: int) -> None:
        nonlocal done
        done += finished
        if on_progress:
            on_progress(done, whole)

    def score() -> tuple[list[Written], dict[str, float]]:
        """Answers and scores of the model as it is now."""
        written = answer_samples(
            model,
            tokenizer,
            asked,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_batch=count,
        )
        answers = [one.answer for one in written]
        scores = {name: METRICS[name](answers, wanted) for name in by_answers}
        if "loss" in metrics:
            scores |= held_out_scores(
                learned_by, model, tokenizer, rows, batch_size or FEW_ROWS, count
            )
        return written, scores

    tuned_answers, tuned_scores = score()
    with bare(model, learned_by.reference):
        base_answers, base_scores = score()
    return Evaluation(
        rows=len(samples),
        prompts=len(groups),
        scores={
            name: {"base": base_scores[name], "tuned": tuned_scores[name]}
            for name in dict.fromkeys([*metrics, *tuned_scores])
        },
        examples=[
            Example(sample.prompt, texts, base.answer, tuned.answer)
            for sample, texts, base, tuned in zip(
                asked, wanted, base_answers, tuned_answers, strict=True
            )
        ],
        notices=[
            *short,
            *_left_out(base_answers, tuned_answers),
            *(_too_short_for_bleu(wanted) if "bleu" in metrics else []),
        ],
        seconds=round(time.perf_counter() - began, 2),
    )


def references(
    tokenizer: PreTrainedTokenizerBase, groups: Iterable[Sequence[Sample]], templated: bool
) -> list[list[str]]:
    """The answers that the rows of each group have, as the template writes them.

    Without reasoning and end marks; `templated` is False for models that read no chat template.
    """
    if not templated:
        return [[sample.reference for sample in group] for group in groups]
    form = answer_form(tokenizer)
    return [[taught_answer(sample, tokenizer, form)[1] for sample in group] for group in groups]


def _left_out(base: Sequence[Written], tuned: Sequence[Written]) -> list[str]:
    counts = [sum(bool(one.reasoning.strip()) for one in written) for written in (base, tuned)]
    if not any(counts):
        return []
    return [
        f"reasoning before the answer is left out of the comparison: in {counts[0]:,} of "
        f"{len(base):,} answers of the base, {counts[1]:,} of the adapter"
    ]


def _too_short_for_bleu(wanted: Sequence[Sequence[str]]) -> list[str]:
    if METRICS["bleu"]([own[0] for own in wanted], wanted):
        return []
    return [
        "bleu is 0 here for every answer, also for right ones: it counts runs of four words and no "
        "reference has four. See exact_match and rouge"
    ]


def _check_room(
    model: LoraModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Sample],
    max_new_tokens: int,
) -> list[str]:
    """A notice of prompts that leave less room than an answer may take."""
    positions = positions_of(model)
    if positions is None:
        return []

    def length(sample: Sample) -> int:
        text = prompt_text(sample.prompt, tokenizer, sample.tools)
        tokens = len(prompt_row(text, sample.prompt, tokenizer, where=sample.where))
        if tokens >= positions:
            raise InputError(
                f"{sample.where}: the prompt has {tokens:,} tokens and the model reads "
                f"{positions:,}, so there is no room for an answer: shorten the row or drop it"
            )
        return tokens

    lengths = each(asked, length)
    if short := sum(tokens + max_new_tokens > positions for tokens in lengths):
        return [
            f"answers to {count_of(short, 'prompt')} have less room than {max_new_tokens} tokens, "
            f"as the model reads {positions:,}"
        ]
    return []


def _check_samples(samples: Sequence[Sample], by_answers: Sequence[str]) -> None:
    if not samples:
        raise InputError("there are no rows to evaluate: give a file that has some")
    plain = next((s for s in samples if s.text is not None), None)
    if by_answers and plain is not None:
        raise InputError(
            f"{plain.where} is plain text, which {by_answers[0]} cannot score: "
            "use --metrics loss, or rows with an answer"
        )
