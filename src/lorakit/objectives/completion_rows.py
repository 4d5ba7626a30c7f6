"""Sampled completions as rows: a group behind one prompt, what each is worth, and its tensors.

A group's rows begin alike, so that a batch computes their prompt once (`data.prefixes`). All that
the loss and the metrics need of completions stands in a batch under names that begin with
`rollout.`, so that a step is the same however it is divided. Groups that are learned several times
are kept in checkpoints (`kept_tensors`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorakit.data.masking import IGNORE, RowGroup, TokenizedRow

if TYPE_CHECKING:
    import torch

    from lorakit.objectives.rollout import Rollout

PROMPTS = "asked.numbers"
"""Of a batch of prompts: their numbers (rows,)."""

PREFIX = "rollout."

IDLE = "idle."
"""Of a batch: the groups that are not computed, under such names (`data.batches.under`)."""


@dataclass(frozen=True, slots=True)
class CompletionRow(TokenizedRow):
    """A completion behind its prompt; its labels are the tokens that the model has sampled.

    Attributes:
        logprobs: of the labels, when they were sampled.
        size: tokens of the completion that the model has sampled.
        cut_off: whether it ended by its limit of tokens.
        rewards: of each function, NaN where it gave none.
        reward: their weighted sum, NaN where none gave one.
        advantage: what the loss takes it for.
    """

    logprobs: tuple[float, ...] = ()
    size: int = 0
    cut_off: bool = False
    rewards: tuple[float, ...] = ()
    reward: float = 0.0
    advantage: float = 0.0


@dataclass(frozen=True, slots=True)
class CompletionGroup(RowGroup):
    """The completions of one prompt.

    Attributes:
        number: the prompt's.
        signal: whether the rewards differ.
        fresh: the weights are those that sampled it.
        learned: it is one to learn from, not one that is only scored.
        replaced: groups without signal that it was sampled in place of.
        continues: it is a further piece of a group, of which the first one is counted.
    """

    number: int = -1
    signal: bool = True
    fresh: bool = True
    learned: bool = True
    replaced: int = 0
    continues: bool = False

    @property
    def has_gradient(self) -> bool:
        """Whether an advantage is not 0 of a completion that is learned."""
        rows = [row for row in self.parts if isinstance(row, CompletionRow)]
        return any(row.advantage and row.logprobs for row in rows)

    def again(self) -> CompletionGroup:
        """The same, learned once more."""
        return replace(self, fresh=False)


def completion_row(
    prompt: TokenizedRow, rollout: Rollout, masked: bool, **worth: Any
) -> CompletionRow:
    """The row of a rollout.

    Args:
        masked: none of its tokens is learned.
        worth: `rewards`, `reward`, `advantage`.
    """
    tokens, learned = list(rollout.tokens), rollout.learned
    labels = [
        token if own and not masked else IGNORE for token, own in zip(tokens, learned, strict=True)
    ]
    logprobs: list[float] = []
    if not masked:
        pairs = zip(rollout.logprobs, learned, strict=True)
        logprobs = [value for value, own in pairs if own]
    before = prompt.input_ids if rollout.prompt is None else rollout.prompt
    return CompletionRow(
        [*before, *tokens],
        [IGNORE] * len(before) + labels,
        prompt.where,
        logprobs=tuple(logprobs),
        size=sum(learned),
        cut_off=rollout.finish_reason == "length",
        **worth,
    )


def with_gradient(
    groups: Sequence[CompletionGroup], everywhere: bool
) -> tuple[list[CompletionGroup], list[CompletionGroup]]:
    """The groups to compute, at least one, and those that have no gradient.

    Args:
        everywhere: the loss has a gradient where advantages are 0 too, as a KL has.
    """
    active = [group for group in groups if everywhere or group.has_gradient]
    idle = [group for group in groups if not (everywhere or group.has_gradient)]
    return (active, idle) if active else (idle[:1], idle[1:])


def in_passes(groups: Sequence[CompletionGroup], tokens: int | None) -> list[list[CompletionGroup]]:
    """These groups in order, as many together as have at most `tokens` tokens.

    A group that has more is divided, but no completion is: no loss compares completions, whose
    advantages are known.

    Args:
        tokens: None for any number.
    """
    if tokens is None:
        return [[*groups]]
    passes: list[list[CompletionGroup]] = []
    filled = 0
    for group in (piece for whole in groups for piece in _divided(whole, tokens)):
        if not passes or filled + len(group) > tokens:
            passes.append([])
            filled = 0
        passes[-1].append(group)
        filled += len(group)
    return passes


def _divided(group: CompletionGroup, tokens: int) -> list[CompletionGroup]:
    """The completions of a group in as few pieces of as many as have about so many tokens."""
    size = -(-len(group.parts) // -(-len(group) // tokens))
    if size >= len(group.parts):
        return [group]
    pieces = []
    for at in range(0, len(group.parts), size):
        own = CompletionGroup.of(*group.parts[at : at + size])
        pieces.append(
            replace(
                group,
                input_ids=own.input_ids,
                labels=own.labels,
                parts=own.parts,
                continues=at > 0,
            )
        )
    return pieces


def group_tensors(groups: Sequence[CompletionGroup]) -> dict[str, torch.Tensor]:
    """What a batch's loss and metrics need of S completions in groups, by `rollout.NAME`.

    `lengths` (S,) learned tokens, `sizes` (S,) all tokens, `cut_off` (S,), `rewards` (S, F),
    `reward` (S,), `signal` and `replaced` of each of the groups; of those to learn also
    `advantages` (S,), `logprobs` (n,) and `fresh` (S,).
    """
    import torch

    counted = [group for group in groups if not group.continues]
    rows = [row for group in groups for row in group.parts if isinstance(row, CompletionRow)]
    found = {
        "lengths": torch.tensor([len(row.logprobs) for row in rows]),
        "sizes": torch.tensor([row.size for row in rows]),
        "cut_off": torch.tensor([row.cut_off for row in rows]),
        "rewards": _floats([row.rewards for row in rows]),
        "reward": _floats([row.reward for row in rows]),
        "signal": torch.tensor([group.signal for group in counted], dtype=torch.bool),
        "replaced": torch.tensor([group.replaced for group in counted], dtype=torch.int64),
    }
    if all(group.learned for group in groups):
        found |= {
            "advantages": _floats([row.advantage for row in rows]),
            "logprobs": _floats([value for row in rows for value in row.logprobs]),
            "fresh": torch.tensor([group.fresh for group in groups for _ in group.parts]),
        }
    return {PREFIX + name: value for name, value in found.items()}


def _floats(values: Any) -> torch.Tensor:
    import torch

    narrow = torch.backends.mps.is_available()  # which has no float64
    return torch.tensor(values, dtype=torch.float32 if narrow else torch.float64)


# --- in checkpoints -------------------------------------------------------------------------------

_FLAT = ("input_ids", "labels", "logprobs", "rewards")


def kept_tensors(batches: Sequence[Sequence[CompletionGroup]]) -> dict[str, Any]:
    """All of the groups of some batches, as tensors for safetensors and a text of the rest."""
    import torch

    rows = [row for batch in batches for group in batch for row in group.parts]
    flat = {name: [x for row in rows for x in getattr(row, name)] for name in _FLAT}
    tensors = {
        name: torch.tensor(values, dtype=torch.float64 if name in _FLAT[2:] else torch.int64)
        for name, values in flat.items()
    }
    rest = [
        [
            {
                **{name: getattr(group, name) for name in ("number", "signal", "replaced")},
                "parts": [
                    {
                        **{name: getattr(row, name) for name in _OF_ROWS},
                        "lengths": [len(getattr(row, name)) for name in _FLAT],
                    }
                    for row in group.parts
                ],
            }
            for group in batch
        ]
        for batch in batches
    ]
    return {"tensors": tensors, "rest": json.dumps(rest)}


_OF_ROWS = ("where", "size", "cut_off", "reward", "advantage")


def kept_groups(tensors: Mapping[str, torch.Tensor], rest: str) -> list[list[CompletionGroup]]:
    """The groups that `kept_tensors` were made of."""
    flat = {name: iter(tensors[name].tolist()) for name in _FLAT}

    def row(values: dict[str, Any]) -> CompletionRow:
        lengths = values.pop("lengths")
        parts: dict[str, Any] = {
            name: [next(flat[name]) for _ in range(n)]
            for name, n in zip(_FLAT, lengths, strict=True)
        }
        for name in _FLAT[2:]:
            parts[name] = tuple(parts[name])
        return CompletionRow(**parts, **values)

    def group(values: dict[str, Any]) -> CompletionGroup:
        parts = [row(one) for one in values.pop("parts")]
        return replace(CompletionGroup.of(*parts), **values)

    return [[group(one) for one in batch] for batch in json.loads(rest)]
