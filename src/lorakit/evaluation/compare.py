"""Adapters beside each other on the same rows: their losses, and where their answers differ.

Each adapter is opened on its own base with its own chat template, one after the other, so that
only one model is in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.adapters.open import OpenAdapter, open_adapter
from lorakit.data.conversations import Message
from lorakit.data.samples import Sample
from lorakit.errors import InputError
from lorakit.evaluation.answers import answer_samples
from lorakit.evaluation.held_out import mean_loss
from lorakit.progress import task


@dataclass(frozen=True)
class ChangedAnswer:
    """A prompt that two adapters answer differently, and the row's own answer."""

    prompt: list[Message]
    reference: str
    first: str
    second: str


def losses(
    adapters: Sequence[str | Path],
    samples: Sequence[Sample],
    *,
    base: str | None = None,
    dtype: str | None = None,
) -> list[float]:
    """The mean loss of each adapter over `samples`, in nats per supervised token.

    Raises:
        InputError: an adapter cannot be opened, or is for no causal language model.
    """
    found = []
    for folder in adapters:
        opened = _opened(folder, base, dtype)
        most = opened.manifest.recipe["data"].get("max_length", 1024) if opened.manifest else 1024
        with task(f"evaluating {folder}", len(samples)):
            found.append(mean_loss(opened.model, opened.tokenizer, samples, most))
    return found


def changed_answers(
    first: str | Path,
    second: str | Path,
    samples: Sequence[Sample],
    *,
    base: str | None = None,
    dtype: str | None = None,
    max_new_tokens: int = 256,
) -> tuple[list[ChangedAnswer], int]:
    """Greedy answers of two adapters where they are not the same, and how many prompts there were.

    Reasoning before an answer is not compared.

    Raises:
        InputError: an adapter cannot be opened, is for no causal language model, or a row is
            plain text.
    """
    plain = next((sample for sample in samples if sample.text is not None), None)
    if plain is not None:
        raise InputError(f"{plain.where} is plain text: to compare answers, rows need a prompt")
    asked = list({sample.prompt_key: sample for sample in samples}.values())
    answers = []
    for folder in (first, second):
        opened = _opened(folder, base, dtype)
        with task(f"answering with {folder}", len(asked)):
            written = answer_samples(
                opened.model, opened.tokenizer, asked, max_new_tokens=max_new_tokens
            )
        answers.append([one.answer for one in written])
    changed = [
        ChangedAnswer(sample.prompt, sample.reference, one, other)
        for sample, one, other in zip(asked, *answers, strict=True)
        if one != other
    ]
    return changed, len(asked)


def _opened(folder: str | Path, base: str | None, dtype: str | None) -> OpenAdapter:
    opened = open_adapter(folder, base=base, dtype=dtype)
    if opened.task_type != "CAUSAL_LM":
        raise InputError(
            f"{folder} is for {opened.task_type}: compare such adapters with lorakit eval"
        )
    return opened
