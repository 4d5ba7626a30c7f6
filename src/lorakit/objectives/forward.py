"""A model as an objective calls it: under its own adapter, or under several in the same pass.

Which tokens count is told by the batch's labels; how their cross-entropy is taken without logits
for the other tokens is `models.loss`' work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

from lorakit.data.batches import joined_lines
from lorakit.lora.routing import BASE, FROZEN, Route
from lorakit.models.loaded import has_dropout
from lorakit.models.loss import IGNORE, LabelLoss, SupervisedLoss
from lorakit.models.sequence_scores import SequenceScores

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "ACTIVE",
    "BASE",
    "TEACHER",
    "Forward",
    "bare",
    "per_sequence",
    "supervised_per_sequence",
]

ACTIVE = "__active__"
"""The name that stands for the adapter in training."""

TEACHER = "teacher"
"""The name of the adapter that another one learns from; no frozen one is added to it."""


class Forward:
    """A model as a loss calls it.

    Args:
        adapted: the model with its adapter.
        reader: takes the cross-entropy of labels.

    Attributes:
        module: what is called: `adapted`, or what a framework has wrapped around it.
        smoothing: the share of a target that is spread evenly over all classes.
        frozen: adapters that every other one is added to.
    """

    def __init__(
        self, adapted: nn.Module, reader: SupervisedLoss | LabelLoss | SequenceScores
    ) -> None:
        self.adapted, self.reader = adapted, reader
        self.module, self.smoothing = adapted, 0.0
        self._known: tuple[torch.Tensor, torch.Tensor, bool] | None = None
        self._entropies: torch.Tensor | None = None
        own: Any = adapted if getattr(adapted, "routing", None) is not None else None
        names = own.adapters if own is not None else ()
        self.frozen = tuple(name for name in names if name.startswith(FROZEN))

    def calling(self, module: nn.Module, smoothing: float = 0.0) -> Forward:
        """The same, with another module and label smoothing."""
        other = copy(self)
        other.module, other.smoothing = module, smoothing
        return other

    def given(
        self,
        batch: Mapping[str, torch.Tensor],
        losses: torch.Tensor,
        of_base: bool = False,
        entropies: torch.Tensor | None = None,
    ) -> Forward:
        """The same, where `token_losses` of a batch are known: out of a pass with other rows.

        Args:
            losses: those of the batch, (n,); with their graph in training.
            of_base: they are the bare base's.
            entropies: (n,), where `with_entropies` is asked for them.
        """
        other = copy(self)
        other._known, other._entropies = (batch["labels"], losses, of_base), entropies
        return other

    @property
    def training(self) -> bool:
        """Whether the model is in training mode, and no held-out row is scored."""
        return bool(self.module.training)

    @property
    def is_base(self) -> bool:
        """Whether no adapter is in force, so that the model is its own base."""
        if self._known is not None:
            return self._known[2]
        routing: Any = getattr(self.adapted, "routing", None)
        return routing is None or routing.route == Route()

    def _route(self, adapter: str) -> Route:
        """The route under which rows have `adapter`, with the frozen ones; `BASE`, or `TEACHER`."""
        if adapter == BASE:
            return Route()
        own: Any = self.adapted
        own.require(adapter)
        if adapter == TEACHER:
            return Route(shared=(TEACHER,))
        return Route(shared=tuple(dict.fromkeys((adapter, *self.frozen))))

    def token_losses(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of every supervised token (n,), sequence after sequence, in nats."""
        if self._known is not None and self._known[0] is batch["labels"]:
            return self._known[1]
        assert isinstance(self.reader, SupervisedLoss)
        return self.reader.of_tokens(self.module, batch, self.smoothing)

    def states(
        self, batch: Mapping[str, torch.Tensor], adapter: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`SupervisedLoss.states` of a batch.

        Args:
            adapter: under which the model runs, `BASE` for none, then without dropout; None is
                what is in force.
        """
        assert isinstance(self.reader, SupervisedLoss)
        routing: Any = getattr(self.adapted, "routing", None)
        if adapter is None or (routing is None and adapter == BASE):
            return self.reader.states(self.module, batch)
        assert routing is not None, f"the model has no adapter {adapter}"
        with self._without_dropout(), routing.using(self._route(adapter)):
            return self.reader.states(self.module, batch)

    def sequence_scores(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The score of every sequence (sequences,) by a head with one output."""
        assert isinstance(self.reader, SequenceScores)
        return self.reader.of_sequences(self.module, batch)

    def label_logits(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss of a batch's labels, and their logits (batch, places, classes)."""
        assert isinstance(self.reader, LabelLoss)
        total, _, logits = self.reader.with_logits(self.module, batch, self.smoothing)
        return total, logits

    def token_log_probabilities(
        self, batch: Mapping[str, torch.Tensor], adapters: Sequence[str] = ()
    ) -> list[torch.Tensor]:
        """The log-probability of every supervised token (n,), sequence after sequence, in nats.

        Args:
            adapters: the names under which it is asked for, all in one pass: of adapters, `ACTIVE`
                for the one in training, `BASE` for the bare base. None for what is in force.

        Returns: one tensor for each of `adapters`.
        """
        if not adapters and self._known is not None and self._known[0] is batch["labels"]:
            return [-self._known[1]]
        assert isinstance(self.reader, SupervisedLoss)
        routing: Any = getattr(self.adapted, "routing", None)
        if not adapters or routing is None:  # a bare model is its own base
            found = -self.reader.of_tokens(self.module, batch)
            # As beside an adapter, no gradient goes through what the base alone says.
            return [found.detach() if name == BASE else found for name in adapters or [ACTIVE]]
        active: Any = self.adapted.active_adapter or BASE
        names = tuple(active if name == ACTIVE else name for name in adapters)
        if len(names) == 1 or self.frozen:  # a row of a shared pass has one adapter
            found_of_each = []
            for name in names:
                with routing.using(self._route(name)):
                    found_of_each.append(-self.reader.of_tokens(self.module, batch))
            return found_of_each
        dimension = 1 if "cu_seq_lens_q" in batch else 0
        several = repeated(batch, len(adapters))
        rows, tokens = several["input_ids"].shape
        sizes = (batch["input_ids"].shape[dimension],) * len(adapters)
        with routing.using(Route(rows=names, shape=(rows, tokens), sizes=sizes)):
            found = -self.reader.of_tokens(self.module, several)
        return list(found.chunk(len(adapters)))

    def with_collisions(
        self, batch: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probability of every supervised token (n,), and log sum_v p_v^2 of the
        distribution that it is of (n,), without gradients; under the adapter in force.
        """
        assert isinstance(self.reader, SupervisedLoss)
        losses, collisions = self.reader.with_collisions(self.module, batch)
        return -losses, collisions

    def with_entropies(
        self, batch: Mapping[str, torch.Tensor], learned: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probability of every supervised token (n,), and the entropy (n,) in nats of the
        distribution that it is of; under the adapter in force.

        Args:
            learned: gradients go through the entropies too; not for those that are `given`.
        """
        if self._entropies is not None and self._known and self._known[0] is batch["labels"]:
            return -self._known[1], self._entropies
        assert isinstance(self.reader, SupervisedLoss)
        losses, entropies = self.reader.with_entropies(self.module, batch, learned)
        return -losses, entropies

    def log_probabilities(
        self, batch: Mapping[str, torch.Tensor], adapters: Sequence[str] = ()
    ) -> list[torch.Tensor]:
        """The log-probability of each sequence's supervised tokens (sequences,), in nats.

        Args:
            adapters: as in `token_log_probabilities`.

        Returns: one tensor for each of `adapters`.
        """
        counts = supervised_per_sequence(batch)
        return [
            per_sequence(part, counts) for part in self.token_log_probabilities(batch, adapters)
        ]

    def of_reference(self, batch: Mapping[str, torch.Tensor], adapter: str) -> torch.Tensor:
        """`token_log_probabilities` (n,) under an adapter that is not trained, or `BASE`.

        There are no gradients and no dropout.
        """
        import torch

        with self._without_dropout(), torch.no_grad():
            [found] = self.token_log_probabilities(batch, (adapter,))
        return found

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        draws = self.training and has_dropout(self.adapted)
        if draws:
            self.module.eval()
        try:
            yield
        finally:
            if draws:
                self.module.train()


@contextmanager
def bare(model: Any, reference: str | None) -> Iterator[None]:
    """Within the block the bare base is in force, and a reference stays what it is.

    Args:
        model: the model with its adapters.
        reference: `Objective.reference`.
    """
    if reference in (None, BASE):
        with model.disable_adapter():
            yield
    else:
        with model.routing.using(Route()):
            yield


def supervised_per_sequence(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """How many tokens of each sequence of a causal model's batch are supervised (sequences,)."""
    import torch

    learned = batch["labels"][:, 1:] != IGNORE
    if "cu_seq_lens_q" not in batch:
        return learned.sum(1)
    begins = batch["cu_seq_lens_q"].long()
    # The first label of a segment is ignored, so that tokens and their predictions are together.
    before = torch.cat([learned.new_zeros(2, dtype=torch.int64), learned[0].cumsum(0)])
    counts = before[begins[1:]] - before[begins[:-1]]
    if (parents := batch.get("parents")) is not None:
        is_prefix = torch.zeros_like(parents, dtype=torch.bool)
        is_prefix[parents[parents >= 0].long()] = True
        counts = counts[~is_prefix]  # what is shared is not learned
    return counts


def repeated(batch: Mapping[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    """A causal model's batch so many times, one after the other: rows, or in one line."""
    import torch

    if "cu_seq_lens_q" in batch:
        return joined_lines([batch] * times)
    return {name: torch.cat([tensor] * times) for name, tensor in batch.items()}


def per_sequence(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sums of neighbouring values (n,), so many for each of the sequences as `counts` says."""
    import torch

    owner = torch.arange(len(counts), device=values.device).repeat_interleave(counts)
    return values.new_zeros(len(counts)).index_add(0, owner, values)
