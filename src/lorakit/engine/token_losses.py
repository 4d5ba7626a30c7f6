"""Rows that an adapter learns from, and losses of their tokens' log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lorakit.errors import InputError
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
            `logprobs` of the policy that sampled.
    """

    adapter: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    inputs: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in {"labels": self.labels, **self.inputs}.items():
            if len(values) != len(self.input_ids):
                raise InputError(
                    f"{name}: {len(values)} values for a row of {len(self.input_ids)} tokens"
                )

    def learned(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The values of `inputs[name]` at the learned tokens: (n,), of `like`'s dtype and device.

        Raises:
            InputError: the row has no such input.
        """
        if name not in self.inputs:
            raise InputError(f"this loss needs {name} for each token")
        pairs = zip(self.inputs[name][1:], self.labels[1:], strict=True)
        values = [value for value, label in pairs if label != IGNORE]
        return torch.tensor(values, dtype=like.dtype, device=like.device)


TokenLoss = Callable[[torch.Tensor, AdapterRow], torch.Tensor]
"""The loss of a row, a scalar, of the log-probabilities (n,) of its learned tokens."""


def cross_entropy(logprobs: torch.Tensor, row: AdapterRow) -> torch.Tensor:
    """The negative log-likelihood of a row's learned tokens, summed; times `weights` if given."""
    if "weights" in row.inputs:
        logprobs = logprobs * row.learned("weights", logprobs)
    return -logprobs.sum()


@dataclass(frozen=True)
class PassResult:
    """What a pass gave, in the order of its rows.

    Attributes:
        logprobs: of each row, the log-probabilities (n,) of its learned tokens, in nats.
        losses: of each row; empty where no loss was asked for.
    """

    logprobs: list[torch.Tensor]
    losses: list[float]

    @property
    def metrics(self) -> dict[str, float]:
        """The loss and the learned tokens, summed over all rows."""
        return {"loss": sum(self.losses), "tokens": float(sum(map(len, self.logprobs)))}
