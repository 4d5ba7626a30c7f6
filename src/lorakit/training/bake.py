"""A prompt becomes an adapter: answers behind the prompt, distillation, and what it came to.

The bare base answers questions behind the prompt, an adapter learns by `objectives.distill` to have
the same probabilities without it, and questions that it did not learn from say how near it came.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lorakit import atomic
from lorakit.adapters.open import open_adapter
from lorakit.bootstrap import Interval, loss_interval
from lorakit.data.prompts import Prompt
from lorakit.data.samples import Sample
from lorakit.data.splits import held_out, shuffled_groups
from lorakit.data.templates import ensure_template
from lorakit.engine.sampler import sampled_answers
from lorakit.engine.sampling import prompt_tokens
from lorakit.errors import InputError, LorakitError
from lorakit.evaluation.held_out import batch_losses, collator_of
from lorakit.models.load import load_model
from lorakit.objectives.distill import Distill
from lorakit.training.output import check_output
from lorakit.training.recipe import Recipe, load_recipe
from lorakit.training.run import train
from lorakit.training.yaml_file import read_yaml

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.masking import TokenizedRow

ANSWERS_NAME, RECORD_NAME = "answers.jsonl", "bake.json"

DEFAULTS: dict[str, Any] = {
    "data": {"eval": 0.2},
    "training": {"num_train_epochs": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-4},
    "lora": {"r": 16, "lora_alpha": 32},
    "samples": 0,
}
"""What a recipe for this has where it does not say."""


@dataclass(frozen=True)
class Baked:
    """How near an adapter came to its base behind the prompt, on questions that it did not learn.

    Attributes:
        kl_before, kl: KL(base behind the prompt | base alone, or the adapter), nats a token.
        agreement_before, agreement: the share of tokens at which both have the same likeliest one.
        closed: the share of `kl_before` that is gone.
        tokens_saved: what a request's prompt is shorter by.
        questions, held_out: how many were learned from, and how many measured.
    """

    kl_before: Interval
    kl: Interval
    agreement_before: Interval
    agreement: Interval
    closed: float
    tokens_saved: int
    questions: int
    held_out: int


def bake(
    system: str,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    *,
    answers: int = 2,
    max_kl: float | None = None,
    quiet: bool = False,
) -> Baked:
    """Trains the adapter that `recipe` describes to answer `prompts` as if `system` stood before.

    Its folder has `answers.jsonl`, the questions with the base's answers, and `bake.json`, what
    this returns, beside what every run leaves.

    Args:
        system: the text that requests shall not need any more.
        recipe: with the objective `distill` and without rows (`bake_recipe`).
        answers: how many the base gives to each question that is learned.
        max_kl: the largest held-out KL, nats a token, that is accepted; None is half of that
            without the adapter.

    Raises:
        InputError: the prompts or the recipe cannot be used; nothing is written then.
        LorakitError: training failed, or the adapter is not near enough; it is left as it is.
    """
    if len({json.dumps(prompt.messages) for prompt in prompts}) < 5:
        raise InputError("baking needs at least 5 different prompts: some are held out to measure")
    objective = recipe.make_objective()
    assert isinstance(objective, Distill)
    check_output(Path(recipe.output_dir), resume=False)
    learned, held = _divided(prompts, recipe)
    asked = [_asked(prompt) for prompt in (*learned * answers, *held)]
    model, tokenizer = load_model(recipe.model, recipe.dtype, quantization=recipe.quantization)
    ensure_template(tokenizer)
    settings = objective.settings
    taught = [objective.for_teacher(sample) for sample in asked]
    texts = sampled_answers(model, tokenizer, taught, settings.max_new_tokens, settings.seed)
    del model
    gc.collect()
    rows = [_row(sample, text) for sample, text in zip(asked, texts, strict=True)]
    sides = {"train": rows[: -len(held)], "eval": rows[-len(held) :]}
    data = {part: [row for row in some if row] for part, some in sides.items()}
    if not all(data.values()):
        raise LorakitError("the base's answers behind the prompt are empty: nothing can be learned")
    folder = train(recipe, data=data, quiet=quiet).output_dir
    lines = [json.dumps(row, ensure_ascii=False) for some in data.values() for row in some]
    atomic.write_file(folder / ANSWERS_NAME, "\n".join(lines) + "\n")
    found = _measured(folder, objective, data["eval"], len(learned), recipe)
    atomic.write_file(folder / RECORD_NAME, json.dumps(asdict(found), indent=2) + "\n")
    bound = found.kl_before.mean / 2 if max_kl is None else max_kl
    if found.kl.mean > bound:
        raise LorakitError(
            f"{folder} does not answer as the base does behind the prompt: its held-out KL is "
            f"{found.kl.mean:.3f} nats a token, above {bound:.3f} ({found.kl_before.mean:.3f} "
            "without it). Give more prompts, more epochs or a higher rank, or a larger --max-kl"
        )
    return found


def bake_recipe(
    system: str,
    source: str | Path | None,
    overrides: Sequence[str | tuple[str, Any]],
    **settings: Any,
) -> Recipe:
    """The recipe of a run that bakes `system`: `DEFAULTS`, and what is given over them.

    Args:
        source, overrides: as in `load_recipe`.
        settings: further ones of the objective.
    """
    values = dict(read_yaml(Path(source))) if source else {}
    for key, default in DEFAULTS.items():
        own = values.get(key)
        values[key] = {**default, **own} if isinstance(own, dict) else values.get(key, default)
    usual = {"beta": 0.0, "lmbda": 0.0, "temperature": 1.0}
    objective = {"type": "distill", "system": system, **usual, **settings}
    return load_recipe(values, [("objective", objective), ("data.train", "prompts"), *overrides])


def _measured(
    folder: Path, objective: Distill, rows: Sequence[dict[str, Any]], questions: int, recipe: Recipe
) -> Baked:
    """The adapter in `folder` and its base, beside the base behind the prompt, on `rows`."""
    opened = open_adapter(folder, dtype=recipe.dtype, tell=lambda line: None)
    model, tokenizer = opened.model, opened.tokenizer
    samples = [
        Sample(
            tuple(row["messages"]), None, f"{ANSWERS_NAME}, held out", tuple(row.get("tools", ()))
        )
        for row in rows
    ]
    rows_of = [objective.tokenize(s, tokenizer, recipe.data.max_length) for s in samples]
    kept = [i for i, row in enumerate(rows_of) if row.supervised]  # others are too long
    samples, tokenized = [samples[i] for i in kept], [rows_of[i] for i in kept]
    tuned = _sums(objective, model, tokenizer, tokenized)
    with model.disable_adapter():
        base = _sums(objective, model, tokenizer, tokenized)
    keys = [sample.prompt_key for sample in samples]
    units = [list(dict.fromkeys(keys)).index(key) for key in keys]

    def interval(sums: list[dict[str, float]], name: str) -> Interval:
        per_row = [(one[name], int(one["count"])) for one in sums]
        return loss_interval(per_row, units, recipe.training.seed)

    def length(sample: Sample) -> int:
        return len(prompt_tokens(sample.prompt, tokenizer, sample.tools))

    saved = [length(objective.for_teacher(sample)) - length(sample) for sample in samples]
    before, after = interval(base, "kl"), interval(tuned, "kl")
    return Baked(
        kl_before=before,
        kl=after,
        agreement_before=interval(base, "agreement"),
        agreement=interval(tuned, "agreement"),
        closed=1 - after.mean / before.mean if before.mean else 0.0,
        tokens_saved=round(median(saved)),
        questions=questions,
        held_out=len(set(keys)),
    )


def _sums(
    objective: Distill,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
) -> list[dict[str, float]]:
    """`Loss.sums` of each row by itself."""
    batches, collate = [[i] for i in range(len(rows))], collator_of(objective, tokenizer)
    return [
        {name: float(value) for name, value in loss.sums().items()}
        for _, loss in batch_losses(objective, model, rows, batches, collate)
    ]


def _divided(prompts: Sequence[Prompt], recipe: Recipe) -> tuple[list[Prompt], list[Prompt]]:
    """Those that are learned and those that are measured; equal ones are on one side."""
    share = recipe.data.eval
    if not isinstance(share, float) or not share:
        raise InputError("data.eval is the share of the prompts to measure on, such as 0.2")
    groups = shuffled_groups([json.dumps(prompt.messages) for prompt in prompts], recipe.data_seed)
    chosen = held_out(groups, max(share, 2 / len(prompts))) or {*min(groups, key=len)}
    sides: tuple[list[Prompt], list[Prompt]] = ([], [])
    for i, prompt in enumerate(prompts):
        sides[i in chosen].append(prompt)
    return sides


def _asked(prompt: Prompt) -> Sample:
    answer = {"role": "assistant", "content": ""}
    return Sample((*prompt.messages, answer), None, prompt.where, prompt.tools)


def _row(sample: Sample, answer: str) -> dict[str, Any] | None:
    """The question with its answer; None where this is empty."""
    if not answer:
        return None
    row = {"messages": [*sample.prompt, {"role": "assistant", "content": answer}]}
    return row | ({"tools": list(sample.tools)} if sample.tools else {})
