"""Reinforcement learning with rewards: GRPO and its relatives (Shao et al. 2024, arXiv:2402.03300).

At each step the adapter samples several completions of every prompt; reward functions judge them,
and what is better than expected (`advantages.py`) becomes likelier (`policy_gradient.py`). Sampler
and trainer are one resident model: the log-probabilities by which completions were sampled are the
old ones of the loss, and how far they differ from the trainer's own is measured.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lorakit.data.batches import in_parts, taken_from, under
from lorakit.data.prompt_tokens import PromptRow, prompt_row
from lorakit.data.too_long import WHOLE, Limit
from lorakit.errors import InputError, LorakitError
from lorakit.models.load import positions_of
from lorakit.models.loss import SupervisedLoss
from lorakit.objectives import grpo_metrics, policy_gradient
from lorakit.objectives.advantages import advantages
from lorakit.objectives.batch_sums import EACH, Loss, added
from lorakit.objectives.completion_prompts import asked_prompts
from lorakit.objectives.completion_records import CompletionLog
from lorakit.objectives.completion_rewards import judged, no_functions, with_environment
from lorakit.objectives.completion_rows import (
    IDLE,
    PREFIX,
    PROMPTS,
    CompletionGroup,
    completion_row,
    group_tensors,
    in_passes,
    with_gradient,
)
from lorakit.objectives.forward import BASE, Forward
from lorakit.objectives.grpo_loss import policy_loss
from lorakit.objectives.grpo_settings import GrpoSettings
from lorakit.objectives.grpo_warnings import GrpoWarnings
from lorakit.objectives.objective import Batch, Collate, Objective
from lorakit.objectives.resident_reward import ResidentReward
from lorakit.objectives.rollout import AskedPrompt, Rollout, RowsOfBatches, Sampling
from lorakit.rewards.inputs_of_rows import reward_columns
from lorakit.rewards.rewards import Rewards

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.dataset import PreparedData
    from lorakit.data.masking import TokenizedRow
    from lorakit.data.samples import Sample
    from lorakit.models.load import LoadedModel
    from lorakit.objectives.objective import TrainingInputs
    from lorakit.objectives.run_request import RunRequest


@dataclass(frozen=True)
class _Answered:
    """A prompt with its completions and their rewards (G, F), what functions logged for the first
    completion, and how many other groups it replaced."""

    prompt: PromptRow
    rollouts: Sequence[Rollout]
    rewards: torch.Tensor
    extra: Mapping[str, Any]
    replaced: int = 0


class Grpo(Objective):
    """Rewards of sampled completions, by policy gradients.

    Held-out prompts get one completion each; their `loss` is minus the mean reward.
    """

    name = "grpo"
    unit = "completion"
    row_kinds = ("conversation", "prompt")
    smooths_labels = False
    packable = False
    learning_rates: ClassVar[Mapping[str, float]] = {"small": 1e-4, "medium": 2e-5, "large": 1e-5}
    epochs: ClassVar[Sequence[tuple[int, int]]] = ((200, 4), (2_000, 2))
    shown_metrics: ClassVar[Sequence[str] | Mapping[str, str]] = grpo_metrics.SHOWN
    Settings = GrpoSettings
    keeps_columns = True
    samples_held_out = True
    reads_entropies = True

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._reference: str | None = BASE
        self.rewards: Rewards | None = None
        self.beside: list[ResidentReward] = []
        self._log = CompletionLog()
        self._limit = Limit(WHOLE)
        self._prompts: list[PromptRow] = []
        self._to_learn: list[int] = []
        self._warnings = GrpoWarnings(self.settings)
        self._of_rollouts = grpo_metrics.RolloutMeans()

    @property
    def score_names(self) -> Sequence[str]:  # type: ignore[override]
        """As in `Objective`: the reward, the mean of each function, and lengths."""
        return [*grpo_metrics.LEAST_NAMES, *(f"rewards/{n}/mean" for n in self._reward_names)]

    @property
    def logged(self) -> Sequence[str]:  # type: ignore[override]
        """As in `Objective`."""
        kinds = ("mean", "std")
        return [
            *grpo_metrics.TRAINED,
            *(f"rewards/{name}/{kind}" for name in self._reward_names for kind in kinds),
        ]

    @property
    def lower_is_better(self) -> Sequence[str]:  # type: ignore[override]
        """As in `Objective`."""
        return ("completions/clipped_ratio", "completions/mean_length")

    @property
    def _reward_names(self) -> Sequence[str]:
        own = self.rewards.names if self.rewards is not None else ()
        environment = self.settings.environment_name
        return own if environment is None else (*own, environment)

    @property
    def reference(self) -> str | None:
        """As in `Objective`: what the KL divergence is from."""
        return self._reference if self.settings.beta else None

    @reference.setter
    def reference(self, name: str | None) -> None:
        self._reference = name

    @property
    def reads_reference(self) -> bool:  # type: ignore[override]
        """As in `Objective`."""
        return bool(self.settings.beta)

    @property
    def shares_passes(self) -> bool:  # type: ignore[override]
        """As in `Objective`: not where logits are divided, or completions learned in turns."""
        s = self.settings
        in_turns = s.steps_per_generation is not None or s.num_iterations != 1
        plain = s.temperature == 1 and not in_turns and self.rollouts == "engine"
        plain = plain and not s.learns_by_entropy
        return plain and self.reference in (None, BASE)

    @property
    def rollouts(self) -> str:  # type: ignore[override]
        """As in `Objective`."""
        return "environment" if self.settings.converses else str(self.settings.rollouts)

    @property
    def on_policy(self) -> bool:
        """Whether there are completions of the model: always."""
        return True

    @property
    def steps_per_generation(self) -> int | None:  # type: ignore[override]
        """As in `Objective`."""
        found: int | None = self.settings.steps_per_generation
        return found

    @property
    def num_iterations(self) -> int:  # type: ignore[override]
        """As in `Objective`."""
        return int(self.settings.num_iterations)

    def refused(self, recipe: Any) -> Iterator[str]:
        """As in `Objective`."""
        size = self.settings.steps_per_generation
        together = recipe.training.gradient_accumulation_steps
        if size is not None and size % together:
            yield (
                f"objective.steps_per_generation is {size}: it should be a multiple of "
                f"training.gradient_accumulation_steps ({together}), so that an optimizer step "
                "learns completions of one policy"
            )
        if recipe.data.packing:
            yield (
                "data.packing has no effect with objective grpo, whose batches are prompts with "
                "num_generations completions each: leave it out"
            )

    # --- rows -------------------------------------------------------------------------------

    def prepare(self, request: RunRequest) -> TrainingInputs:
        """As in `Objective`. Raises InputError where rewards cannot be loaded."""
        s = self.settings
        self.beside = []
        if s.rewards or s.environment is None:
            self.rewards = Rewards.opened(
                s.rewards, s.weights, s.reward_timeout, scorer=self._reward_adapter
            )
        try:
            return super().prepare(request)
        except BaseException:
            self.close()
            raise

    def _reward_adapter(self, folder: str) -> ResidentReward:
        """The scorer of a reward adapter, which the run puts beside its own."""
        self.beside.append(ResidentReward(folder, f"reward_{len(self.beside)}"))
        return self.beside[-1]

    def close(self) -> None:
        """Ends the processes of reward functions."""
        if self.rewards is not None:
            self.rewards.close()

    def with_settings(self, settings: Any) -> Self:
        """As in `Objective`; other rewards are loaded."""
        other = super().with_settings(settings)
        other._warnings = GrpoWarnings(settings)
        other._log = CompletionLog()
        other._of_rollouts = grpo_metrics.RolloutMeans()
        names = ("rewards", "weights", "reward_timeout")
        if any(getattr(settings, name) != getattr(self.settings, name) for name in names):
            other.rewards = Rewards.opened(*(getattr(settings, name) for name in names))
        return other

    def read(self, request: RunRequest, loaded: LoadedModel) -> PreparedData:
        """As in `Objective`; all columns of rows are there for the rewards."""
        self._limit = Limit(request.max_length, positions_of(loaded.model))
        self._prompts.clear()
        data = super().read(request, loaded)
        self._to_learn = [row.number for row in data.train if isinstance(row, PromptRow)]
        samples: list[Any] = [*data.train_samples, *data.eval_samples]
        for sample in samples:
            if self.rewards is not None:
                self.rewards.check([*reward_columns(sample)], sample.where)
        return data

    def as_learned(self, sample: Sample) -> Sample:
        """The sample. Raises InputError where its prompt has pictures."""
        if sample.pictures:
            raise InputError(
                f"{sample.where}: has pictures, and objective grpo samples completions of text "
                "alone: drop the row"
            )
        return sample

    def tokenize(
        self, sample: Sample, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> TokenizedRow:
        """The prompt's tokens; those without room for a completion are left out."""
        return prompt_row(sample, tokenizer, max_length)

    def together(self, rows: Sequence[TokenizedRow], max_length: int) -> Sequence[TokenizedRow]:
        """The prompts, each with a number of its own; copies of one have the same."""
        numbered: dict[int, PromptRow] = {}
        for row in rows:
            if isinstance(row, PromptRow) and id(row) not in numbered:
                numbered[id(row)] = replace(row, number=len(self._prompts))
                self._prompts.append(numbered[id(row)])
        return [numbered[id(row)] for row in rows]

    def to_batch(self, rows: Sequence[TokenizedRow], collate: Collate) -> dict[str, torch.Tensor]:
        """The numbers of prompts; or the tensors of completions, with what the loss needs.

        Groups without any gradient are not computed: they count, and are measured by what was
        sampled. The others are computed in passes of at most `pass_tokens` tokens.
        """
        import torch

        groups = [row for row in rows if isinstance(row, CompletionGroup)]
        if not groups:
            numbers = [row.number for row in rows if isinstance(row, PromptRow)]
            return {PROMPTS: torch.tensor(numbers)}
        if not all(group.learned for group in groups):
            return group_tensors(groups)
        everywhere = bool(self.settings.beta) or self.settings.learns_by_entropy
        active, idle = with_gradient(groups, everywhere)
        passes = in_passes(active, self.pass_tokens)
        batch = in_parts([collate(own) | group_tensors(own) for own in passes])
        return batch | under(IDLE, group_tensors(idle)) if idle else batch

    # --- completions ------------------------------------------------------------------------

    def sampled_rows(self, batches: Sequence[Batch], step: int | None) -> Sampling:
        """As in `Objective`: groups of completions in the place of prompts."""
        numbers = [batch[PROMPTS].tolist() for batch in batches]
        prompts = [self._prompts[n] for several in numbers for n in several]
        answered = yield from self._answered(prompts, step)
        if self.settings.dynamic_sampling and step is not None:
            answered = yield from self._with_signal(answered, step)
        groups = iter(self._groups(answered, learned=step is not None))
        found: RowsOfBatches = [[next(groups) for _ in several] for several in numbers]
        return found

    def _answered(
        self, prompts: Sequence[PromptRow], step: int | None
    ) -> Generator[Sequence[AskedPrompt], Sequence[Rollout], list[_Answered]]:
        each = 1 if step is None else self.settings.num_generations
        rollouts = yield asked_prompts(prompts, self.settings, step, each, self._limit.tokens)
        groups = [rollouts[at : at + each] for at in range(0, len(rollouts), each)]
        asked = [
            judged(prompt, rollout)
            for prompt, group in zip(prompts, groups, strict=True)
            for rollout in group
        ]
        state = self.trainer_state
        table = self.rewards(asked, state) if self.rewards else no_functions(len(asked))
        if (name := self.settings.environment_name) is not None:
            table = with_environment(table, name, rollouts, asked)
        self._warnings.met(table.problems)
        self._log.metrics |= table.metrics
        parts = table.values.split(each)
        extra = [
            {name: values[at] for name, values in table.extra.items()}
            for at in range(0, len(rollouts), each)
        ]
        return [_Answered(*one) for one in zip(prompts, groups, parts, extra, strict=True)]

    def _with_signal(
        self, answered: list[_Answered], step: int
    ) -> Generator[Sequence[AskedPrompt], Sequence[Rollout], list[_Answered]]:
        """These groups, those without signal replaced by groups of further prompts (DAPO)."""
        asked = [one.prompt.number for one in answered]
        others = sorted({*self._to_learn} - {*asked})
        random.Random(f"{self.settings.seed} {step} {asked}").shuffle(others)
        answered = list(answered)
        for _ in range(self.settings.max_resamples):
            dull = [i for i, one in enumerate(answered) if not self._has_signal(one)]
            now, others = others[: len(dull)], others[len(dull) :]
            if not now:
                break
            tried = yield from self._answered([self._prompts[n] for n in now], step)
            for i, one in zip(dull, tried, strict=False):  # fewer where prompts run out
                answered[i] = replace(one, replaced=answered[i].replaced + 1)
        return answered

    def _has_signal(self, one: _Answered) -> bool:
        weights = self._weights.to(one.rewards)
        return bool(advantages(one.rewards, weights, len(one.rewards)).signal)

    @property
    def _weights(self) -> torch.Tensor:
        import torch

        own = self.rewards.weights if self.rewards is not None else ()
        environment = () if self.settings.environment is None else (1.0,)
        return torch.tensor([*own, *environment], dtype=torch.float64)

    def _groups(self, answered: Sequence[_Answered], learned: bool) -> list[CompletionGroup]:
        """The rows of completions, with advantages over all of the step's in all processes."""
        import torch

        s = self.settings
        own = [one.rewards.tolist() for one in answered]
        everyone, before = self.gather(own) if learned else (own, 0)
        if learned:
            measured = [dict(rollout.metrics) for one in answered for rollout in one.rollouts]
            self._of_rollouts.add(self.gather(measured)[0])
        rewards = torch.tensor(everyone, dtype=torch.float64).flatten(0, 1)
        found = advantages(
            rewards,
            self._weights,
            s.num_generations if learned else 1,
            s.advantage_estimator,
            s.scale_rewards,
            s.multi_objective_aggregation,
        )
        size = len(own[0]) if own else 1
        groups = []
        for i, one in enumerate(answered, before):
            rows = [
                completion_row(
                    one.prompt,
                    rollout,
                    not learned
                    or (s.mask_truncated_completions and rollout.finish_reason == "length"),
                    rewards=tuple(values),
                    reward=float(found.rewards[i * size + k]),
                    advantage=float(found.values[i * size + k]),
                )
                for k, (rollout, values) in enumerate(zip(one.rollouts, everyone[i], strict=True))
            ]
            groups.append(
                replace(
                    CompletionGroup.of(*rows),
                    number=one.prompt.number,
                    signal=bool(found.signal[i]),
                    learned=learned,
                    replaced=one.replaced,
                )
            )
            totals = found.rewards[i * size : (i + 1) * size].tolist()
            if learned:
                self._log.add(one.prompt, one.rollouts, everyone[i], totals, one.extra)
            else:
                self._log.add_held_out(one.prompt, everyone[i][0], totals[0])
        return groups

    # --- what is kept of them -----------------------------------------------------------------

    def taken_completions(self) -> dict[str, Any]:
        """As in `Objective`."""
        return self._log.taken(self._reward_names, self.gather)

    def taken_held_out(self) -> dict[str, Any]:
        """As in `Objective`."""
        return self._log.taken_held_out(self._reward_names, self.gather)

    @property
    def reward_facts(self) -> list[dict[str, Any]]:
        """As in `Objective`."""
        return [] if self.rewards is None else self.rewards.facts()

    # --- loss and scores --------------------------------------------------------------------

    def reader(self, model: nn.Module, own_logits: bool) -> SupervisedLoss:
        """Log-probabilities at the temperature of sampling."""
        return SupervisedLoss(model, own_logits, self.settings.temperature)

    def count(self, batch: Batch) -> int:
        """What the loss type divides by."""
        names = (PREFIX + "lengths", IDLE + PREFIX + "lengths")
        lengths = [batch[name] for name in names if name in batch]
        count = policy_gradient.LOSSES[self.settings.loss_type].normalisation.count
        tokens, completions = sum(int(x.sum()) for x in lengths), sum(map(len, lengths))
        return count(tokens, completions, self.settings)

    def loss(self, forward: Forward, batch: Batch) -> Loss:
        """The policy's loss over completions; of held-out ones minus the reward."""
        import torch

        metrics = grpo_metrics.of_completions(batch)
        if PREFIX + "advantages" not in batch:
            return Loss(-metrics["reward.sum"].sum(), metrics["reward.count"].sum(), metrics)
        total, own = policy_loss(forward, batch, self.settings, self.reference, self.count(batch))
        metrics |= own
        if idle := taken_from(batch, IDLE):
            unread = {name: torch.zeros_like(value) for name, value in metrics.items()}
            own = grpo_metrics.of_completions(idle) | grpo_metrics.of_sampled(idle)
            metrics = added(metrics, unread | own)
        return Loss(total, self.count(batch), metrics)

    @property
    def needs_all_batches(self) -> bool:
        """As in `Objective`: where entropies of one token are compared with those of others."""
        return bool(self.settings.learns_by_entropy)

    def beforehand(self, forward: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        """The entropies of tokens, or how many there are, and what losses are divided by."""
        import torch

        if PREFIX + "advantages" not in batch:
            return {}
        count = torch.tensor(self.count(batch))
        if self.settings.top_entropy_quantile == 1:
            return {"count": count, "tokens": batch[PREFIX + "lengths"].sum()}
        return {"count": count, f"{EACH}entropies": forward.with_entropies(batch)[1].detach()}

    def held_out(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """As in `Objective`. Raises LorakitError where no held-out completion has a reward."""
        if "tokens" not in sums and not float(sums["count"]):
            raise LorakitError(
                "no held-out completion has a reward: every function gave None or failed for all "
                "of them; try them with lorakit rewards"
            )
        return super().held_out(sums)

    def scores(self, sums: Mapping[str, torch.Tensor], count: float) -> dict[str, float]:
        """The metrics by TRL's names."""
        found = grpo_metrics.named(sums, self._reward_names)
        return found | self._of_rollouts.taken() if "tokens" in sums else found

    def warnings(self, logs: Mapping[str, float]) -> Iterator[tuple[str, str, str]]:
        """As in `Objective`."""
        yield from self._warnings.of(logs)
