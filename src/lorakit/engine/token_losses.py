"""Rows that an adapter learns from, and losses of their tokens' log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from lorakit.errors import InputError
from lorakit.models.adapted_head import Targets
from lorakit.models.loss import IGNORE


@dataclass(frozen=True)
class AdapterRow:
    """One row to learn from.

    Args:
        adapter: whose row it is; `BASE` in `forward` for the bare base.
        input_ids: the tokens.
        labels: as many, `IGNORE` (-100) where nothing is learned; `labels[t]` is predicted from
            the tokens before it, so that the first one is never learned.
        inputs: further numbers of a loss, one for each token, such as `weights`, `advantages`, or
            `logprobs` of the policy that sampled; with `targets`, (tokens, K) where the loss
            takes a number for each of these.
        targets: (tokens, K), int64; K tokens in the place of each label that is not `IGNORE`,
            such as those that a teacher finds likely. The loss gets (n, K) log-probabilities.
    """

    adapter: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    inputs: Mapping[str, Sequence[float] | torch.Tensor] = field(default_factory=dict)
    targets: torch.Tensor | None = None

    def __post_init__(self) -> None:
        given: dict[str, Sequence[float] | torch.Tensor] = {"labels": self.labels, **self.inputs}
        if self.targets is not None:
            given["targets"] = self.targets
        for name, values in given.items():
            if len(values) != len(self.input_ids):
                raise InputError(
                    f"{name}: {len(values)} values for a row of {len(self.input_ids)} tokens"
                )

    @cached_property
    def learns(self) -> torch.Tensor:
        """(tokens,), bool: which tokens are learned, never the first."""
        learns = torch.tensor([*self.labels]) != IGNORE
        learns[:1] = False
        return learns

    def learned(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """`inputs[name]` at the learned tokens, (n,) or (n, K), of `like`'s dtype and device.

        Raises:
            InputError: the row has no such input.
        """
        if name not in self.inputs:
            raise InputError(f"this loss needs {name} for each token")
        values = torch.as_tensor(self.inputs[name], dtype=like.dtype)
        return values[self.learns].to(like.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its log-probabilities: (n,), or (n, K) with targets."""
        learned = int(self.learns.sum())
        return (learned,) if self.targets is None else (learned, self.targets.shape[1])


def answer_row(
    adapter: str, prompt: Sequence[int], answer: Sequence[int], **inputs: Sequence[float] | float
) -> AdapterRow:
    """A row of which the answer is learned.

    Args:
        prompt, answer: tokens.
        inputs: one for each token of the answer, or one for all.
    """
    before = [0.0] * len(prompt)
    return AdapterRow(
        adapter,
        [*prompt, *answer],
        [IGNORE] * len(prompt) + [*answer],
        {
            name: [*before, *([each] * len(answer) if isinstance(each, int | float) else each)]
            for name, each in inputs.items()
        },
    )


def row_passes(
    rows: Sequence[AdapterRow], alone: Collection[str], most: int | None
) -> Iterator[dict[str, list[int]]]:
    """The positions of rows by adapter, at most `most` tokens a pass, but at least a row.

    Args:
        alone: the adapters whose rows share no pass with others'.
        most: None for any number.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.adapter if row.adapter in alone else "", []).append(i)
    for group in groups.values():
        filled: dict[str, list[int]] = {}
        tokens = 0
        for i in group:
            length = len(rows[i].input_ids)
            if filled and most is not None and tokens + length > most:
                yield filled
                filled, tokens = {}, 0
            filled.setdefault(rows[i].adapter, []).append(i)
            tokens += length
        yield filled


def targets_of(rows: Sequence[AdapterRow], device: torch.device) -> Targets | None:
    """The targets of rows one behind the other; None where no row has several a token."""
    if all(row.targets is None for row in rows):
        return None
    positions: list[torch.Tensor] = []
    tokens: list[torch.Tensor] = []
    begin = 0
    for row in rows:
        given = torch.tensor([*row.labels])[:, None] if row.targets is None else row.targets
        own = given[row.learns]
        positions.append(torch.arange(begin, begin + len(own)).repeat_interleave(own.shape[1]))
        tokens.append(own.flatten())
        begin += len(own)
    return Targets(torch.cat(positions).to(device), torch.cat(tokens).to(device))


TokenLoss = Callable[[torch.Tensor, AdapterRow], torch.Tensor]
"""The loss of a row, a scalar, of its learned tokens' log-probabilities: (n,), or (n, K)."""


def cross_entropy(logprobs: torch.Tensor, row: AdapterRow) -> torch.Tensor:
    """The negative log-likelihood of a row's learned tokens, summed; times `weights` if given."""
    if "weights" in row.inputs:
        logprobs = logprobs * row.learned("weights", logprobs)
    return -logprobs.sum()


@dataclass(frozen=True)
class PassResult:
    """What a pass gave, in the order of its rows.

    Attributes:
        logprobs: of each row, the log-probabilities of its learned tokens, in nats: (n,), or
            (n, K) of a row with targets.
        losses: of each row; empty where no loss was asked for.
    """

    logprobs: list[torch.Tensor]
    losses: list[float]

    @property
    def metrics(self) -> dict[str, float]:
        """The loss and the learned tokens, summed over all rows."""
        return {"loss": sum(self.losses), "tokens": float(sum(map(len, self.logprobs)))}
