"""What a run begins with, by its task: the model's form, its rows, its batches, loss and scores.

A causal language model is the common case. A classifier's head needs the labels of the rows before
it can be made, so there the rows are read first; an encoder-decoder reads the prompt and learns
the answer. From there on a run is the same for all (`run.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.data.batches import LabelCollator
from lorakit.data.checks import findings
from lorakit.data.dataset import PreparedData, prepare
from lorakit.data.label_rows import notice_unseen, tokenize_sequence, tokenize_words
from lorakit.data.labelled import (
    LabelledSample,
    Labels,
    collect_labels,
    hold_out,
    notice_labels,
    read_labelled,
)
from lorakit.data.mixing import DataFacts, Source, notice_of_own
from lorakit.data.samples import Sample
from lorakit.data.scores import LabelScorer
from lorakit.data.seq2seq import tokenize_pair
from lorakit.data.sources import read_source
from lorakit.data.splits import HELD_OUT, LEARNED
from lorakit.data.template_clock import (
    Rendering,
    StandingClock,
    at,
    notices_of_rendering,
    time_in,
)
from lorakit.data.templates import render
from lorakit.data.too_long import Limit, fit, none_left
from lorakit.errors import InputError, listed
from lorakit.models.forms import CLASSIFICATION
from lorakit.models.label_loss import LabelLoss
from lorakit.models.load import load_for_task, load_model, positions_of
from lorakit.models.loss import SupervisedLoss
from lorakit.models.template_files import digest

if TYPE_CHECKING:
    from datetime import datetime

    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.lora.config import LoraConfig
    from lorakit.models.template_files import Templates
    from lorakit.training.recipe import Recipe


class Loss(Protocol):
    """The loss of a batch: a sum and what it is a sum of, so that batches add up exactly."""

    def __call__(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss in nats, and the number of labels that it is taken on.

        Args:
            smoothing: the share of a target that is spread evenly over all classes.
        """

    def count(self, labels: torch.Tensor) -> torch.Tensor:
        """How many of a batch's labels the loss is taken on."""


@dataclass(frozen=True)
class Beginning:
    """A model and its rows, ready for an adapter.

    Args:
        loss: makes the loss of a model; its second argument says that weights are spread over
            machines.
        collator: makes a batch's tensors; None where rows may lie in one line too.
        new_modules: what the adapter trains whole and keeps.
        labels: the classes, of a classifier.
        scorer: what predictions are scored by, of a classifier.
        templates: the chat templates that rows were rendered with; None where no row was.
        rendered_at: the time that a template wrote into rows, where one did.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    loss: Callable[[nn.Module, bool], Loss] = SupervisedLoss
    collator: LabelCollator | None = None
    new_modules: list[str] = field(default_factory=list)
    labels: Labels | None = None
    scorer: LabelScorer | None = None
    templates: Templates | None = None
    rendered_at: datetime | None = None

    def lora_config(self, recipe: Recipe) -> LoraConfig:
        """The recipe's, with the new modules among those that are trained whole."""
        config = recipe.lora_config()
        if self.new_modules:
            own = config.modules_to_save or []
            config.modules_to_save = list(dict.fromkeys([*own, *self.new_modules]))
        return config


def rendering_facts(begun: Beginning) -> dict[str, Any]:
    """What the record keeps of the chat template, fields of `Manifest`."""
    templates, time = begun.templates, begun.rendered_at
    return {
        "template_sha256": None if templates is None else digest(templates),
        "template_time": time.isoformat() if time else None,
    }


def begin(
    recipe: Recipe,
    dtype: torch.dtype,
    device: str | None = None,
    rendering: Rendering | None = None,
) -> Beginning:
    """Loads the recipe's model and prepares its rows.

    Args:
        dtype, device: of the model, as in `load_model`.
        rendering: how rows are to become text; None is as the tokenizer has it, now.

    Raises:
        InputError: the model or the rows cannot be used.
    """
    if recipe.task_type in CLASSIFICATION:
        return _classification(recipe, dtype, device)
    if recipe.task_type == "SEQ_2_SEQ_LM":
        return _seq2seq(recipe, dtype, device)
    return _causal(recipe, dtype, device, rendering or Rendering())


def _causal(
    recipe: Recipe, dtype: torch.dtype, device: str | None, rendering: Rendering
) -> Beginning:
    model, tokenizer = load_model(
        recipe.model, dtype, device=device, quantization=recipe.quantization
    )
    if rendering.templates is not None:
        tokenizer.chat_template = rendering.templates
    clock = StandingClock(rendering.time)
    with at(clock):
        data = prepare(
            tokenizer,
            recipe.data.train,
            recipe.data.eval,
            max_length=recipe.data.max_length,
            columns=recipe.data.columns or None,
            limit=recipe.data.limit,
            seed=recipe.data_seed,
            too_long=recipe.data.too_long,
            positions=positions_of(model),
        )
    samples = (*data.train_samples, *data.eval_samples)
    conversations = [s for s in samples if isinstance(s, Sample) and s.messages]
    if not conversations:
        return Beginning(model, tokenizer, data)
    templates: Any = tokenizer.chat_template
    texts = (partial(render, s.messages, tokenizer, tools=s.tools) for s in conversations)
    time = time_in(texts, clock)
    data.notices.extend(notices_of_rendering(time, templates))
    return Beginning(
        model,
        tokenizer,
        data,
        templates=templates,
        rendered_at=time,
    )


def _seq2seq(recipe: Recipe, dtype: torch.dtype, device: str | None) -> Beginning:
    seed = recipe.training.seed
    loaded = load_for_task(
        recipe.task_type,
        recipe.model,
        dtype,
        device=device,
        seed=seed,
        quantization=recipe.quantization,
    )
    data = prepare(
        loaded.tokenizer,
        recipe.data.train,
        recipe.data.eval,
        max_length=recipe.data.max_length,
        columns=recipe.data.columns or None,
        limit=recipe.data.limit,
        seed=recipe.data_seed,
        to_row=tokenize_pair,
        too_long=recipe.data.too_long,
        positions=positions_of(loaded.model),
    )
    return Beginning(
        loaded.model,
        loaded.tokenizer,
        data,
        loss=lambda model, _: LabelLoss(model, targets=True),
        collator=LabelCollator(loaded.tokenizer.pad_token_id),
        new_modules=loaded.new_modules,
    )


def _classification(recipe: Recipe, dtype: torch.dtype, device: str | None) -> Beginning:
    one_label = recipe.task_type == "SEQ_CLS"
    train, held, facts, notices = _labelled_samples(recipe)
    labels = collect_labels(train, held)
    notices += notice_labels(labels, len(train))
    loaded = load_for_task(
        recipe.task_type,
        recipe.model,
        dtype,
        device=device,
        labels=labels.names,
        seed=recipe.training.seed,
        quantization=recipe.quantization,
    )
    notices.append(
        f"trained whole and saved with the adapter: {listed(loaded.new_modules)} "
        f"({recipe.task_type})"
    )
    to_row = tokenize_sequence if one_label else tokenize_words
    limit = Limit(recipe.data.max_length, positions_of(loaded.model))
    fitted = fit(
        [(i < len(train), sample) for i, sample in enumerate((*train, *held))],
        lambda length: [
            to_row(s, loaded.tokenizer, length, labels.number_of) for s in (*train, *held)
        ],
        limit,
        recipe.data.too_long,
    )
    notices += notice_unseen([row for _, row in fitted.kept])
    to_learn = [(sample, row) for (learns, sample), row in fitted.kept if learns]
    held_out = [(sample, row) for (learns, sample), row in fitted.kept if not learns]
    for key, before, after in (("train", train, to_learn), ("eval", held, held_out)):
        if before and not after:
            raise none_left(key, fitted.left_out, limit)
    found = findings(to_learn, held_out, loaded.tokenizer, limit, fitted.left_out)
    data = PreparedData(
        [row for _, row in to_learn],
        [row for _, row in held_out],
        [sample for sample, _ in to_learn],
        [sample for sample, _ in held_out],
        facts,
        notices,
        found,
    )
    return Beginning(
        loaded.model,
        loaded.tokenizer,
        data,
        loss=lambda model, _: LabelLoss(model),
        collator=LabelCollator(loaded.tokenizer.pad_token_id, one_label),
        new_modules=loaded.new_modules,
        labels=labels,
        scorer=LabelScorer(labels.names, words=not one_label),
    )


def _labelled_samples(
    recipe: Recipe,
) -> tuple[list[LabelledSample], list[LabelledSample], list[DataFacts], list[str]]:
    """Training and held-out samples, what they were read from, and notices."""
    data = recipe.data

    own: list[Source] = []

    def read(sources: Any, key: str) -> tuple[list[LabelledSample], list[DataFacts]]:
        given = sources if isinstance(sources, list) else [sources]
        samples: list[LabelledSample] = []
        facts = []
        for source in given:
            part = source if isinstance(source, Source) else Source(str(source))
            if part.weight != 1:
                raise InputError(
                    f"{key}: {part.path} has a weight, which only causal language models and "
                    "SEQ_2_SEQ_LM learn by; remove it"
                )
            columns = part.columns if part.columns is not None else data.columns
            wanted = LEARNED if key == "data.train" else HELD_OUT
            contents = read_source(part.path, full_names=len(given) > 1, wanted=wanted)
            if contents.held_out:
                own.append(Source(contents.held_out, columns=part.columns))
            found = read_labelled(contents.rows, recipe.task_type, columns, data.limit)
            samples += found
            facts.append(DataFacts(part.path, len(found), contents.sha256))
            notices.extend(contents.notices)
        return samples, facts

    notices: list[str] = []
    samples, facts = read(data.train, "data.train")
    held_out = data.eval
    if isinstance(held_out, (int, float)) and held_out and own:
        notices.append(notice_of_own(own))
        held_out = list(own)
    if isinstance(held_out, (int, float)):
        train, held, said = hold_out(samples, held_out, recipe.data_seed)
        return train, held, facts, [*notices, *said]
    held, held_facts = read(held_out, "data.eval")
    return samples, held, facts + held_facts, notices
