"""The contract of an objective: from a run's rows to token sequences, a loss and held-out scores.

Each objective is one file beside this one, with a subclass of `Objective`, and one line in
`registry`. What it does not define is as for a causal language model. Trainer, checkpoints,
several processes and the record are the same for all of them and know none by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lorakit.data.dataset import PreparedData, prepare
from lorakit.data.formats import SUPERVISED
from lorakit.data.masking import TokenizedRow, tokenize
from lorakit.data.picture_rows import counting, has_pictures
from lorakit.data.pictures import pictures_in
from lorakit.data.samples import Sample, refused_weight
from lorakit.data.template_clock import StandingClock, at, notices_of_rendering, time_in
from lorakit.data.templates import render
from lorakit.data.text_files import SampleBy
from lorakit.data.too_long import Limit, TooLong
from lorakit.errors import InputError, count
from lorakit.models.load import positions_of
from lorakit.models.loss import LabelLoss, SupervisedLoss
from lorakit.models.sequence_scores import SequenceScores
from lorakit.models.template_files import digest
from lorakit.objectives.constants import RowConstants
from lorakit.objectives.forward import Forward, supervised_per_sequence
from lorakit.objectives.settings import Settings, checked_settings
from lorakit.objectives.teacher import read_teacher

if TYPE_CHECKING:
    from datetime import datetime

    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.adapters.lineage import Start
    from lorakit.adapters.manifest import FrozenRecord
    from lorakit.data.labelled import Labels
    from lorakit.models.load import LoadedModel
    from lorakit.models.template_files import Templates
    from lorakit.objectives.batch_sums import Loss
    from lorakit.objectives.rollout import Sampling
    from lorakit.objectives.run_request import RunRequest

Batch = Mapping[str, "torch.Tensor"]
Collate = Callable[[Sequence[TokenizedRow]], "dict[str, torch.Tensor]"]


@dataclass(frozen=True)
class TrainingInputs:
    """A model and its rows, ready for an adapter.

    Args:
        objective: what the rows are learned by; it has read them.
        collator: makes a batch's tensors; None for sequences of tokens, in one line or padded.
        new_modules: what the adapter trains whole and keeps.
        templates: the chat templates that rows were rendered with; None where no row was.
        rendered_at: the time that a template wrote into rows, where one did.
        base_fingerprint: of the base model's weights.
        start: the adapter that the run starts from.
        teacher: the adapter that it learns from.
        own_tokenizer, token_rows: as in `LoadedBase`.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    objective: Objective
    collator: Collate | None = None
    new_modules: list[str] = field(default_factory=list)
    templates: Templates | None = None
    rendered_at: datetime | None = None
    base_fingerprint: str | None = None
    start: Start | None = None
    teacher: FrozenRecord | None = None
    own_tokenizer: bool = False
    token_rows: dict[str, list[int]] = field(default_factory=dict)

    @property
    def has_pictures(self) -> bool:
        """Whether a row has a picture."""
        return any(map(has_pictures, (*self.data.train, *self.data.eval)))

    def rendering_facts(self) -> dict[str, Any]:
        """What the record keeps of the chat template, fields of `Manifest`."""
        templates, time = self.templates, self.rendered_at
        return {
            "template_sha256": None if templates is None else digest(templates),
            "template_time": time.isoformat() if time else None,
        }


class Objective:
    """What a run learns from its rows. Subclasses set `name` and define what differs.

    Most define `row_kinds`, `tokenize`, `loss` and `count`. One instance belongs to one
    run: `prepare` may keep in it what was found in the rows.

    Attributes:
        name: its `type` in a recipe.
        task_type: PEFT's name for the form of the model.
        unit: what the loss is divided by, in words.
        row_kinds: the kinds of rows that it takes (`data.samples.RowFormat.kind`).
        templated: conversations become text by the chat template.
        smooths_labels: the loss has targets that `label_smoothing_factor` can smooth.
        packable: batches are token sequences of a causal model, which can lie in one line
            (packing, padding-free) and whose blocks can be compiled.
        recommended_for: the task by which a rank is recommended (`lora.recommend`).
        learning_rates: the default by the base model's size (`lora.recommend.size_class`); those of
            QLoRA (Dettmers et al. 2023).
        epochs: pairs of a number of rows and the epochs that fewer rows are trained by default;
            for some thousand rows 3 as in Alpaca (Taori et al. 2023).
        shown_metrics: of `scores`, what is shown while training; a mapping has labels.
        head: the names of the outputs of a new head, known before rows are read.
        score_names: the held-out scores that `scores` gives.
        lower_is_better: those of them that are better when they are smaller.
        sample_tokens: the most tokens of the answers that a finished run gives to sample rows.
        too_long: what becomes of long rows where the recipe's `data.too_long` does not say.
        row_settings: the settings that rows depend on; in a sweep all configurations share them.
        constant_settings: the settings that `row_constants` depend on.
        shares_passes: the loss needs, beside `row_constants` and `beforehand`, the losses of tokens
            alone (`Forward.given`), so that adapters with settings of their own share a pass.
        answers: a model that has learned writes answers, which metrics can score.
        labels: the classes, of a classifier that has read its rows.
        reference: the adapter that the one in training is compared with, `BASE` for the bare base;
            None for no reference.
        compares_with_start: a run that starts from an adapter sets `reference` to the start.
        sample_by, overlap: how plain text is read, as in `data.dataset.prepare`.
        keeps_columns: samples keep the columns of their rows, which something reads later.
        samples_held_out: the model answers held-out prompts too, at each evaluation.
        rollouts: what writes the completions that are sampled (`rl.sources`).
        logged: what is logged of `scores` while training; None for `score_names`.
        trainer_state: where the run is when completions are sampled: `global_step` (optimizer
            steps so far), `max_steps` and `epoch`.
        beside: adapters that score completions on the resident base, which `attach` puts there.
        reads_entropies: the loss needs the entropies of tokens too (`Forward.with_entropies`).
        reads_reference: the loss needs the bare base's log-probabilities (`rollout.REFERENCE`).
        gather: makes of this process' values those of all, and says at which its own begin.
        steps_per_generation: batches of a process whose prompts are sampled together; None for
            those of an optimizer step.
        num_iterations: how often sampled completions are learned.
        pass_tokens: the most tokens of a batch that are computed at once, where it can be divided
            (`data.batches.in_parts`); None for any number.
    """

    name: ClassVar[str]
    task_type: ClassVar[str] = "CAUSAL_LM"
    unit: ClassVar[str] = "supervised token"
    row_kinds: ClassVar[tuple[str, ...]] = SUPERVISED
    templated: ClassVar[bool] = True
    smooths_labels: ClassVar[bool] = True
    packable: ClassVar[bool] = True
    recommended_for: ClassVar[str] = "generation"
    learning_rates: ClassVar[Mapping[str, float]] = {"small": 5e-4, "medium": 2e-4, "large": 1e-4}
    epochs: ClassVar[Sequence[tuple[int, int]]] = ((200, 5), (10_000, 3), (50_000, 2))
    shown_metrics: ClassVar[Sequence[str] | Mapping[str, str]] = ()
    too_long: ClassVar[TooLong] = "cut"
    row_settings: ClassVar[Sequence[str]] = ()
    constant_settings: ClassVar[Sequence[str]] = ()
    Settings: ClassVar[type[Settings]] = Settings

    shares_passes: bool = False
    head: ClassVar[Sequence[str]] = ()
    score_names: Sequence[str] = ()
    lower_is_better: Sequence[str] = ()
    sample_tokens: ClassVar[int] = 96
    answers: ClassVar[bool] = True
    labels: Labels | None = None
    reference: str | None = None
    compares_with_start: ClassVar[bool] = True
    sample_by: SampleBy = "auto"
    overlap: int = 1
    keeps_columns: ClassVar[bool] = False
    samples_held_out: ClassVar[bool] = False
    rollouts: str = "engine"
    reads_entropies: ClassVar[bool] = False
    reads_reference: bool = False
    logged: Sequence[str] | None = None
    beside: Sequence[Any] = ()
    trainer_state: Mapping[str, Any] = MappingProxyType({})
    gather: Callable[[list[Any]], tuple[list[Any], int]] = staticmethod(lambda own: (own, 0))
    steps_per_generation: int | None = None
    num_iterations: int = 1
    pass_tokens: int | None = None

    def __init__(self, **settings: Any) -> None:
        """Raises InputError for a setting that the objective does not have, or a wrong value."""
        self.settings: Any = checked_settings(self.Settings, self.name, settings)
        self.constants = RowConstants()

    def with_settings(self, settings: Any) -> Self:
        """The same with other settings, for the rows that this one has read.

        Raises:
            InputError: other settings would have made other rows.
        """
        for name in self.row_settings:
            if getattr(settings, name) != getattr(self.settings, name):
                raise InputError(
                    f"objective.{name} changes the rows, which all configurations of a sweep have "
                    "in common: sweep without it"
                )
        other = copy(self)
        other.settings = settings
        if any(getattr(settings, k) != getattr(self.settings, k) for k in self.constant_settings):
            other.constants = RowConstants()
        return other

    @property
    def teacher(self) -> str | None:
        """The folder of the adapter that is learned from (`forward.TEACHER`), if there is one."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The recipe's `objective`: the type and all settings, as plain JSON types."""
        return {"type": self.name, **self.settings.model_dump(mode="json")}

    def refused(self, recipe: Any) -> Iterator[str]:
        """Why a recipe cannot have this objective, as lines that name a key and a cure.

        Args:
            recipe: a `training.recipe.Recipe`.
        """
        yield from ()

    def close(self) -> None:
        """Lets go of what `prepare` has opened for the run."""

    # --- rows to batches --------------------------------------------------------------------

    def prepare(self, request: RunRequest) -> TrainingInputs:
        """Loads the model and reads the rows.

        Raises:
            InputError: the model or the rows cannot be used.
        """
        base = request.load(self.task_type, self.head)
        loaded, rendering = base.loaded, request.rendering
        model, tokenizer = loaded.model, loaded.tokenizer
        if rendering.templates is not None:
            tokenizer.chat_template = rendering.templates
        teacher = None
        if self.teacher is not None:
            teacher = read_teacher(self.teacher, request.model, model, base.fingerprint)
        clock, done = StandingClock(rendering.time), Counter[str]()
        places = pictures_in(request.media_dir, request.fetch_images)
        with at(clock), places, counting(done):
            data = self.read(request, loaded)
        data.notices.extend(base.notices)
        data.notices.extend(f"{count(n, 'picture')} {what}" for what, n in done.items())
        inputs = TrainingInputs(
            model,
            tokenizer,
            data,
            self,
            self.collator(tokenizer),
            loaded.new_modules,
            base_fingerprint=base.fingerprint,
            start=request.start,
            teacher=teacher,
            own_tokenizer=base.own_tokenizer,
            token_rows=base.token_rows,
        )
        samples = (*data.train_samples, *data.eval_samples)
        conversations = [s for s in samples if isinstance(s, Sample) and s.messages]
        if not conversations or not self.templated:
            return inputs
        texts = (partial(render, s.messages, tokenizer, tools=s.tools) for s in conversations)
        time = time_in(texts, clock)
        templates: Any = tokenizer.chat_template
        data.notices.extend(notices_of_rendering(time, templates))
        return replace(inputs, templates=templates, rendered_at=time)

    def read(self, request: RunRequest, loaded: LoadedModel) -> PreparedData:
        """The rows of `request`, tokenized.

        Raises:
            InputError: they cannot be used.
        """
        own_rows = type(self).tokenize is not Objective.tokenize
        data = prepare(
            loaded.tokenizer,
            request.train,
            request.eval,
            max_length=request.max_length,
            columns=request.columns or None,
            limit=request.limit,
            seed=request.data_seed,
            too_long=request.too_long,
            positions=positions_of(loaded.model),
            complete=partial(self.complete, request=request, loaded=loaded),
            kinds=self.row_kinds,
            to_row=self.tokenize if own_rows else None,
            templated=self.templated,
            sample_by=self.sample_by,
            overlap=self.overlap,
            as_learned=self.as_learned,
            buffer_size=request.buffer_size,
            keeps_columns=self.keeps_columns,
        )
        tokens = Limit(request.max_length, positions_of(loaded.model)).tokens
        train, held_out = (self.together(rows, tokens) for rows in (data.train, data.eval))
        notices = [*data.notices, *self.notices(train)]
        return replace(data, train=train, eval=held_out, notices=notices)

    @classmethod
    def streams(cls) -> bool:
        """Whether rows can be read as they come: each is made by itself, and no other is needed."""
        own = (cls.complete, cls.together, cls.collator)
        return own == (Objective.complete, Objective.together, Objective.collator)

    def as_learned(self, sample: Any) -> Any:
        """What is learned of a row's sample; by default all of it, each answer or none of it.

        Raises:
            InputError: the sample says something of its answers that is not acted on.
        """
        if isinstance(sample, Sample) and sample.weights:
            raise InputError(f"{sample.where}: {refused_weight(sample.weights[0])}")
        return sample

    def complete(
        self, samples: Sequence[Any], held_out: bool, request: RunRequest, loaded: LoadedModel
    ) -> Sequence[Any]:
        """The samples as they are learned, where something of them must still be made.

        Args:
            held_out: they are the held-out ones, not those to learn from.
        """
        return samples

    def tokenize(
        self, sample: Any, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> TokenizedRow:
        """A sample's tokens and labels, cut to `max_length`; a `RowGroup` for several sequences.

        Raises:
            InputError: there is nothing to learn in it.
        """
        return tokenize(sample, tokenizer, max_length)

    def together(self, rows: Sequence[TokenizedRow], max_length: int) -> Sequence[TokenizedRow]:
        """All rows of a split, with what they need of each other; by default as they are."""
        return rows

    def notices(self, rows: Sequence[TokenizedRow]) -> list[str]:
        """Lines about the rows to learn from, for the user."""
        return []

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate | None:
        """Makes a batch's tensors; None for sequences of tokens, in one line or padded."""
        return None

    def to_batch(self, rows: Sequence[TokenizedRow], collate: Collate) -> dict[str, torch.Tensor]:
        """The tensors of a batch: those of `collate`, which the model is given, and others.

        A tensor that the model is not given has a dot in its name.
        """
        return collate(rows) | self.constants.of(rows)

    @property
    def has_constants(self) -> bool:
        """Whether there are values of rows that training does not change (`row_constants`)."""
        return False

    def computes_constants(self, epochs: float) -> bool:
        """Whether `row_constants` of all rows are computed before the first step.

        Args:
            epochs: how often training will see a row.
        """
        return False

    def row_constants(self, forward: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        """What training does not change: of each name a value for each sequence (sequences,).

        There are no gradients and no dropout. `to_batch` gives them to each batch.
        """
        return {}

    # --- loss and scores --------------------------------------------------------------------

    def forward(self, model: nn.Module, own_logits: bool = False) -> Forward:
        """How `loss` calls a model; made before the model is compiled or spread.

        Args:
            model: the model with its adapter.
            own_logits: the model must compute its own logits, as its weights are spread.
        """
        return Forward(model, self.reader(model, own_logits))

    def reader(
        self, model: nn.Module, own_logits: bool
    ) -> SupervisedLoss | LabelLoss | SequenceScores:
        """What takes the cross-entropy of a batch's labels, or scores its sequences."""
        return SupervisedLoss(model, own_logits)

    def beforehand(self, forward: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        """Sums that the loss of a batch needs of all batches that are learned or scored together.

        They are added up (values of single rows put together, where the name begins with `EACH`)
        over the batches of an optimizer step in all processes, or over all held-out rows, and each
        batch gets them as `step.NAME`. There are no gradients and no dropout.
        """
        return {}

    def read_beforehand(self, batch: Batch) -> Batch | None:
        """The batch of whose tokens' losses (`Forward.given`) `beforehand` makes its sums, so that
        several adapters can share the pass; None where it needs none, or more than that.
        """
        return None

    @property
    def needs_all_batches(self) -> bool:
        """Whether there are sums that are taken beforehand."""
        return type(self).beforehand is not Objective.beforehand

    @property
    def on_policy(self) -> bool:
        """Whether the model in training answers prompts at each step (`sampled_rows`)."""
        return False

    def sampled_rows(self, batches: Sequence[Batch], step: int | None) -> Sampling:
        """Yields prompts that the model answers as it is, and returns the rows to learn.

        It may yield several times; each time it is sent the rollouts of the prompts.

        Args:
            batches: those of an optimizer step, or held-out ones.
            step: optimizer steps so far; None for held-out rows (`samples_held_out`).

        Returns: rows in the place of each batch, None for one that is learned as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} samples no completions")

    def taken_completions(self) -> dict[str, Any]:
        """What to keep of the completions that `sampled_rows` has got to learn from since the last
        time, as plain JSON types (`report.completions.StepCompletions`); all processes ask."""
        return {}

    def taken_held_out(self) -> dict[str, Any]:
        """The rewards of held-out prompts since the last time: the names of the functions, and a
        row for each prompt (`completion_records`); all processes ask."""
        return {}

    @property
    def reward_facts(self) -> list[dict[str, Any]]:
        """What the record keeps of reward functions (`rewards.Rewards.facts`)."""
        return []

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The loss of a batch; without gradients, of held-out rows.

        Args:
            forward: calls the model, under the adapters that the loss needs.
            batch: as the collator makes it, on the model's device.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss")

    def supervised(self, batch: Batch) -> torch.Tensor:
        """How many labels of a batch are supervised (int64)."""
        return supervised_per_sequence(batch).sum()

    def count(self, batch: Batch) -> torch.Tensor | int:
        """`Loss.count` of a batch, known before its loss; by default the supervised labels."""
        return self.supervised(batch)

    def held_out(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """`loss` and `scores` of held-out rows, by what `Loss.sums` has added up to."""
        rest = dict(sums)
        total, count = float(rest.pop("total")), float(rest.pop("count"))
        return {"loss": total / count} | self.scores(rest, count)

    def scores(self, sums: Mapping[str, torch.Tensor], count: float) -> dict[str, float]:
        """Scores by name of `Loss.metrics`, summed over held-out rows, or over steps of training.

        By default each is divided by `count`, the sum of `Loss.count`.
        """
        return {name: float(total) / count for name, total in sums.items()}

    # --- what a run chooses and shows -------------------------------------------------------

    def prompts(self, samples: Sequence[Any]) -> list[Sample]:
        """Those of `samples` that a finished run answers with and without the adapter."""
        return [sample for sample in samples if isinstance(sample, Sample) and sample.messages]

    def warnings(self, logs: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
        """What to warn of in logged values, as (name, message, cure); each name once a run.

        Args:
            logs: `loss`, `grad_norm` and this objective's metrics, or the held-out ones with the
                prefix `eval_`.
        """
        yield from ()
