"""What the held-out rows of a sweep give under an adapter, under several at once, or under none.

Where the loss of a row can be told from the losses of its tokens, all adapters share passes, and
each row is judged by every objective that asks. Other tasks take the loss of each row by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit.bootstrap import RowLosses
from lorakit.data.batches import taken_from, under
from lorakit.data.grouping import AT_ONCE
from lorakit.data.masking import TokenizedRow
from lorakit.engine.resident import ResidentModel
from lorakit.engine.shared_pass import AdapterBatch, passes
from lorakit.evaluation.held_out import (
    Judge,
    Sums,
    batch_losses,
    evaluating,
    know_constants,
    row_sums,
    sums_beforehand,
)
from lorakit.lora.model import LoraModel
from lorakit.lora.routing import Route
from lorakit.models.loss import SupervisedLoss
from lorakit.objectives.batch_sums import added, as_tensors, with_sums
from lorakit.objectives.forward import Forward
from lorakit.objectives.objective import Collate, Objective
from lorakit.progress import task
from lorakit.rl.engine_rollouts import EngineRollouts
from lorakit.rl.rollouts import Rollouts, write_together
from lorakit.sweeps.splits import Split
from lorakit.training.batching import Batching

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SplitLosses = dict[str, RowLosses]
"""By split, the losses of its rows."""

TokenLosses = dict[int, torch.Tensor]
"""The losses of the supervised tokens of each row, by the row's id."""


@dataclass(frozen=True)
class HeldOut:
    """What the held-out rows gave with one adapter.

    Args:
        sums: by split, of each row its `Loss.sums`, by the objective of the sweep's recipe.
        scores: `loss` and scores of all rows, by the configuration's own settings.
    """

    sums: dict[str, list[Sums]]
    scores: dict[str, float]

    @property
    def losses(self) -> SplitLosses:
        """By split, the losses of its rows."""
        return {
            split: [(float(row["total"]), int(row["count"])) for row in rows]
            for split, rows in self.sums.items()
        }

    @property
    def metrics(self) -> dict[str, dict[str, list[Any]]]:
        """By split and name, the metric of each row beside its loss, as plain numbers."""
        return {
            split: {
                name: [row[name].tolist() for row in rows]
                for name in rows[0]
                if name not in ("total", "count")
            }
            for split, rows in self.sums.items()
        }


class HeldOutRows:
    """The held-out rows of a sweep.

    Args:
        splits: them by name.
        objective: the sweep's, which all configurations are compared by.
        batching: how rows become batches, with the tensors of an objective.
        shares_passes: whether the losses of tokens tell those of rows.
        tokenizer: says what ends a completion, where completions of held-out prompts are scored.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        objective: Objective,
        batching: Callable[[Objective], Batching],
        shares_passes: bool,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._tokenizer = tokenizer
        self.splits, self.objective, self.batching = splits, objective, batching
        self.shares_passes = shares_passes
        self.rows = [row for part in splits.values() for row in part.rows]

    def of(self, model: nn.Module, own: Objective | None = None) -> HeldOut:
        """Losses and scores with the adapters that are active in `model`.

        Args:
            own: the objective of a configuration; None for the sweep's.
        """
        objectives = self._objectives(own)
        if self.by_samples:
            return self._put_together([self._sampled(model, [""])[0]], own)
        if not self.by_tokens(own):
            return self._put_together([self._one_by_one(model, one) for one in objectives], own)
        loss = SupervisedLoss(model)
        judges = [self._judge(one, model) for one in objectives]
        return self._put_together(
            self._judged(model, lambda b: [loss.of_tokens(model, b)] * len(judges), judges), own
        )

    def of_each(self, resident: ResidentModel, own: Mapping[str, Objective]) -> dict[str, HeldOut]:
        """The same with each of these adapters, by the name of which there is its objective.

        As many of them share a pass as fit into `AT_ONCE` tokens.
        """
        names, judges = list(own), []
        if self.by_samples:
            each = zip(names, self._sampled(resident.model, names), strict=True)
            return {name: self._put_together([sums], own[name]) for name, sums in each}
        everyone = [(name, one) for name in names for one in self._objectives(own[name])]
        sums = iter(self._sums_beforehand(resident, everyone))
        for name, objective in own.items():
            with resident.model.routing.using(Route(shared=(name,))):
                objectives = self._objectives(objective)
                judges.append([self._judge(o, resident.model, next(sums)) for o in objectives])

        def token_losses(batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            several = max(1, AT_ONCE // batch["input_ids"].numel())
            found = [
                losses
                for at in range(0, len(names), several)
                for losses in resident.token_losses(
                    [AdapterBatch(name, batch) for name in names[at : at + several]]
                )
            ]
            return [losses for i, losses in enumerate(found) for _ in judges[i]]

        flat = [judge for several in judges for judge in several]
        found = iter(self._judged(resident.model, token_losses, flat))
        return {
            name: self._put_together([*islice(found, len(judges[i]))], own[name])
            for i, name in enumerate(names)
        }

    def by_tokens(self, own: Objective | None = None) -> bool:
        """Whether rows are judged by the losses of their tokens."""
        return (
            not self.by_samples
            and self.shares_passes
            and all(one.shares_passes for one in self._objectives(own))
        )

    @property
    def by_samples(self) -> bool:
        """Whether completions of held-out prompts are judged, always by the sweep's objective."""
        return self.objective.samples_held_out

    def is_common(self, own: Objective) -> bool:
        """Whether an objective judges as the sweep's does."""
        return self.by_samples or own.settings == self.objective.settings

    def _sampled(self, model: Any, names: Sequence[str]) -> list[list[Sums]]:
        """What the sweep's objective makes of completions of each row, by each of these adapters.

        Args:
            model: with the adapters, or bare.
            names: an empty one is what is in force. Several write in one batch.
        """
        if not isinstance(model, LoraModel):  # the bare base
            wrapped = LoraModel(model, None)
            try:
                return self._sampled(wrapped, names)
            finally:
                wrapped.unload()
        objective, collate = self.objective, self._collate(self.objective)
        rollouts = Rollouts(objective, self._tokenizer, collate)
        prompts = [collate([row]) for row in self.rows]
        if names == [""]:
            found = [rollouts.held_out(prompts, model)]
        else:
            source = EngineRollouts(objective, self._tokenizer)
            asking = {name: rollouts.into_held_out(prompts) for name in names}
            together = write_together(
                asking, lambda prompts, adapters: source.write_each(prompts, adapters, model)
            )
            found = [together[name] for name in names]
        forward = objective.forward(model)
        return [
            [as_tensors(objective.loss(forward, batch).sums()) for batch in batches]
            for batches in found
        ]

    def tokens(self, model: nn.Module) -> TokenLosses:
        """The losses of the supervised tokens of each row."""
        found: TokenLosses = {}
        loss = SupervisedLoss(model)

        def keep(row: TokenizedRow, losses: torch.Tensor) -> Sums:
            found[id(row)] = losses
            return {}

        self._judged(model, lambda batch: [loss.of_tokens(model, batch)], [keep])
        return found

    def scores(self, model: nn.Module, own: Objective, tokens: TokenLosses) -> dict[str, float]:
        """Loss and scores of all rows by other settings, where the losses of tokens are known."""
        judge = self._judge(own, model)
        sums: Sums = {}
        with torch.no_grad():
            for row in self.rows:
                sums = added(sums, judge(row, tokens[id(row)]))
        return own.held_out(sums)

    def _objectives(self, own: Objective | None) -> list[Objective]:
        """The sweep's objective, which all are compared by, and one that judges otherwise."""
        return [self.objective] if own is None or self.is_common(own) else [self.objective, own]

    def _judged(
        self,
        model: nn.Module,
        token_losses: Callable[[dict[str, torch.Tensor]], list[torch.Tensor]],
        judges: Sequence[Judge],
    ) -> list[list[Sums]]:
        """What each of `judges` makes of each row; see `evaluation.held_out.row_sums`."""
        batching, parts = self.batching(self.objective), self.splits.values()
        begins = accumulate((len(part.rows) for part in parts), initial=0)
        batches = [
            [begin + i for i in batch]
            for begin, part in zip(begins, parts, strict=False)
            for batch in batching.held_out_batches(part.rows)
        ]
        collate = batching.collator(learning=False)
        return row_sums(model, self.rows, batches, collate, token_losses, judges)

    def _sums_beforehand(
        self, resident: ResidentModel, asked: Sequence[tuple[str, Objective]]
    ) -> list[Sums | None]:
        """What `beforehand` gives of all rows, by adapters with an objective each.

        They share passes; None for those that need no sums, or passes of their own.
        """
        rows, batches = self.rows, self.batching(self.objective).held_out_batches(self.rows)
        first = self._collate(self.objective)([rows[i] for i in batches[0]])
        needing: dict[str, tuple[str, Objective, Forward]] = {}
        for i, (name, objective) in enumerate(asked):
            if objective.needs_all_batches and objective.read_beforehand(first) is not None:
                with resident.model.routing.using(Route(shared=(name,))):
                    self._know_constants(objective, resident.model)
                    needing[f"{i}/"] = name, objective, objective.forward(resident.model)

        def collate(some: list[TokenizedRow]) -> dict[str, torch.Tensor]:
            made = {key: self._collate(one)(some) for key, (_, one, _) in needing.items()}
            return {k: x for key, batch in made.items() for k, x in under(key, batch).items()}

        found: dict[str, Sums] = {key: {} for key in needing}
        whole = batches if needing else []
        for _, tensors in evaluating(resident.model, rows, whole, collate, counts=False):
            own = {key: taken_from(tensors, key) for key in needing}
            read = {key: needing[key][1].read_beforehand(batch) for key, batch in own.items()}
            several = [AdapterBatch(needing[k][0], b) for k, b in read.items() if b is not None]
            losses = iter([x for p in passes(several, AT_ONCE) for x in resident.token_losses(p)])
            for key, (name, objective, forward) in needing.items():
                if (batch := read[key]) is None:
                    continue
                with resident.model.routing.using(Route(shared=(name,))):
                    known = forward.given(batch, next(losses))
                    sums = as_tensors(objective.beforehand(known, own[key]))
                found[key] = added(found[key], sums)
        return [found.get(f"{i}/") for i in range(len(asked))]

    def _judge(self, objective: Objective, model: nn.Module, before: Sums | None = None) -> Judge:
        """How a row is judged by the losses of its tokens under the adapter in force.

        Args:
            before: what `Objective.beforehand` gives of all rows, where it is known.
        """
        self._know_constants(objective, model)
        collate = self._collate(objective)
        if before is None:
            batches = self.batching(objective).held_out_batches(self.rows)
            before = sums_beforehand(objective, model, self.rows, batches, collate)
        sums, forward = before, objective.forward(model)
        of_base = forward.is_base

        def judge(row: TokenizedRow, losses: torch.Tensor) -> Sums:
            batch = with_sums(collate([row]), sums)
            return objective.loss(forward.given(batch, losses, of_base), batch).sums()

        return judge

    def _collate(self, objective: Objective) -> Collate:
        """Makes a batch's tensors for an objective."""
        return self.batching(objective).collator(learning=False)

    def _know_constants(self, objective: Objective, model: nn.Module) -> None:
        """Computes what training does not change of the rows, unless it is known."""
        batches = self.batching(objective).held_out_batches(self.rows)
        know_constants(objective, model, self.rows, batches, self._collate(objective))

    def _one_by_one(self, model: nn.Module, objective: Objective) -> list[Sums]:
        """Losses of other tasks are sums over a batch, so that each row is one."""
        collate = self._collate(objective)
        each = [[i] for i in range(len(self.rows))]
        with task("evaluating rows", len(self.rows)):
            found = batch_losses(objective, model, self.rows, each, collate)
            return [loss.sums() for _, loss in found]

    def _put_together(self, found: list[list[Sums]], own: Objective | None) -> HeldOut:
        """Of the rows' sums by each of `_objectives(own)`."""
        objective = self.objective if own is None or self.is_common(own) else own
        whole: Sums = {}
        for sums in found[-1]:
            whole = added(whole, sums)
        rows = iter(found[0])
        by_split = {name: [*islice(rows, len(part.rows))] for name, part in self.splits.items()}
        return HeldOut(by_split, objective.held_out(whole))
