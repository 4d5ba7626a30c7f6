"""Reward functions tried before a run: on the answers of rows, and on a model's own completions.

What makes a reward useless or misleading shows in the numbers: it never applies, it is the same
for all completions of a prompt, it is slow, it outweighs the others, or it follows the length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit.data.samples import Sample
from lorakit.errors import count
from lorakit.progress import task
from lorakit.rewards.completion_text import text_of
from lorakit.rewards.inputs_of_rows import reward_input
from lorakit.rewards.reward_table import RewardInput, RewardTable
from lorakit.rewards.rewards import Rewards

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


SLOW = 5.0
"""Seconds of a call above which a function is named as slow."""
_FEW = 0.2  # of groups with signal
_OUTWEIGHS = 20.0  # times as much spread, weighted
_FOLLOWS_LENGTH = 0.8  # correlation
_MANY = 0.2  # of completions that are cut off
_SAME_AGAIN = 32  # completions that are scored twice


@dataclass(frozen=True)
class RewardSummary:
    """One function over completions; numbers are None where it gave no reward at all.

    Attributes:
        name: the function's, or `reward` for the weighted sum.
        mean, std, low, high: of its rewards.
        none: the share of completions without a reward from it.
        signal: the share of groups (completions of one prompt) in which it differs; None without
            groups.
        seconds: that a call took.
    """

    name: str
    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    none: float
    signal: float | None
    seconds: float | None


@dataclass(frozen=True)
class RewardTrial:
    """Rewards of some completions.

    Attributes:
        what: these completions, in words.
        asked: what the functions were given.
        table: what they gave.
        group_size: how many completions in a row belong to one prompt.
        summaries: of each function, and of the weighted sum where there are several.
        findings: what seems wrong with them, with its cure.
    """

    what: str
    asked: Sequence[RewardInput]
    table: RewardTable
    group_size: int
    summaries: Sequence[RewardSummary]
    findings: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        totals = self.table.totals.tolist()
        return {
            "what": self.what,
            "rewards": [asdict(one) for one in self.summaries],
            "problems": [asdict(one) for one in self.table.problems],
            "findings": list(self.findings),
            "completions": [
                {
                    "where": one.where,
                    "prompt": one.prompt,
                    "completion": one.completion,
                    "rewards": {
                        name: None if math.isnan(value) else value
                        for name, value in zip(self.table.names, row, strict=True)
                    },
                    "reward": None if math.isnan(total) else total,
                }
                for one, row, total in zip(
                    self.asked, self.table.values.tolist(), totals, strict=True
                )
            ],
        }


def own_answers(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase | None
) -> list[RewardInput]:
    """The rows' own answers as completions, of those rows that have one.

    Args:
        tokenizer: gives their tokens; without one, words stand for tokens.
    """

    def ids(text: str) -> list[int]:
        if tokenizer is None:
            return [0] * len(text.split())
        return list(tokenizer.encode(text, add_special_tokens=False))

    return [
        reward_input(sample, sample.reference, ids(sample.reference), finish_reason="stop")
        for sample in samples
        if sample.reference
    ]


def tried(
    rewards: Rewards, asked: Sequence[RewardInput], group_size: int, what: str
) -> RewardTrial:
    """The rewards of these completions, and what their numbers say.

    Args:
        group_size: how many completions in a row belong to one prompt; 1 for single answers.

    Raises:
        InputError: the rows lack a column that a function needs.
    """
    rewards.stops = False
    with task(f"rewards of {what}"):
        table = rewards(asked)
        quick = sum(table.seconds.values()) < SLOW and not table.problems
        again = rewards(asked[:_SAME_AGAIN]) if quick else table
    columns = [*table.values.unbind(1), table.totals]
    names = [*table.names, "reward"]
    shown = len(columns) if len(table.names) > 1 else 1
    summaries = [
        _summary(name, column, group_size, table.seconds.get(name))
        for name, column in zip(names[:shown], columns[:shown], strict=True)
    ]
    findings = [*_findings(table, summaries, asked, group_size), *_differing(table, again)]
    return RewardTrial(what, asked, table, group_size, summaries, findings)


def worse_than_sampled(own: RewardTrial, sampled: RewardTrial) -> list[str]:
    """Functions that give the rows' own answers less than what the model samples."""
    found = []
    for one, other in zip(own.summaries, sampled.summaries, strict=True):
        if one.mean is not None and other.mean is not None and one.mean < other.mean - 1e-9:
            found.append(
                f"{one.name} gives the rows' own answers less ({one.mean:.4g}) than completions "
                f"of the model ({other.mean:.4g}): training would lead away from them; the more "
                "the better is meant, and a distance needs a minus"
            )
    return found


def _summary(
    name: str, rewards: torch.Tensor, group_size: int, seconds: float | None
) -> RewardSummary:
    given = rewards[~rewards.isnan()]
    none = 1 - len(given) / max(1, len(rewards))
    signal = _signal(rewards, group_size)
    if not len(given):
        return RewardSummary(name, None, None, None, None, none, signal, seconds)
    std = float(given.std()) if len(given) > 1 else 0.0
    low, high = float(given.min()), float(given.max())
    return RewardSummary(name, float(given.mean()), std, low, high, none, signal, seconds)


def _signal(rewards: torch.Tensor, group_size: int) -> float | None:
    """The share of groups whose rewards are not all the same."""
    if group_size < 2 or not len(rewards):
        return None
    groups = rewards.view(-1, group_size)
    high = groups.nan_to_num(-math.inf).max(1).values
    low = groups.nan_to_num(math.inf).min(1).values
    return float((high - low > 1e-9).double().mean())


def _differing(table: RewardTable, again: RewardTable) -> Iterator[str]:
    """Functions that gave the same completions other rewards when they were asked again."""
    first = table.values[: len(again.values)]
    same = ((first - again.values).abs() <= 1e-9) | (first.isnan() & again.values.isnan())
    for name, own in zip(table.names, same.unbind(1), strict=True):
        if not own.all():
            yield (
                f"{name} gave {count(int((~own).sum()), 'completion')} another reward when it was "
                "asked again: a resumed run then differs; seed what it draws, or ask its judge at "
                "temperature 0"
            )


def _findings(
    table: RewardTable,
    summaries: Sequence[RewardSummary],
    asked: Sequence[RewardInput],
    group_size: int,
) -> Iterator[str]:
    """What seems wrong, one line each, with its cure."""
    own = summaries[: len(table.names)]
    failed = {problem.name for problem in table.problems}
    for one in own:
        if one.mean is None:
            if one.name not in failed:
                yield (
                    f"{one.name} gave None to every completion: it has no effect on these rows; "
                    "check which column it reads"
                )
        elif len(asked) > 1 and one.low == one.high:
            yield from _constant(one, group_size, asked)
        if one.seconds is not None and one.seconds > SLOW:
            yield (
                f"{one.name} took {one.seconds:.1f} s for {count(len(asked), 'completion')}, and "
                "the model waits for it in each step: make it async if it waits for a server, or "
                "keep what it has computed"
            )
    yield from _outweighed(own, table.weights)
    yield from _long(table, own, asked)
    whole = summaries[-1].signal
    varies = summaries[-1].low != summaries[-1].high
    if whole is not None and whole < _FEW and varies:
        yield (
            f"only {whole:.0%} of the groups have completions with different rewards, and the "
            "others teach nothing: take more generations, a higher temperature, easier prompts, "
            "or a reward that gives a part of the points"
        )
    cut = sum(one.finish_reason == "length" for one in asked)
    if cut > _MANY * len(asked):
        yield (
            f"{cut} of {count(len(asked), 'completion')} are cut off at the limit of tokens: "
            "raise it, as unfinished answers are hardly ever right"
        )


def _constant(one: RewardSummary, group_size: int, asked: Sequence[RewardInput]) -> Iterator[str]:
    texts = [text_of(each.completion) for each in asked]
    if one.high == 0 and any("</think>" in text and "<think>" not in text for text in texts):
        yield (
            f"{one.name} gave 0 to every completion, some of which have </think> without <think>: "
            "the chat template writes it into the prompt; built in is {type: format, opened: true}"
        )
    elif group_size > 1:
        yield (
            f"{one.name} gave {one.low:g} to every completion, which teaches nothing: start from "
            "an adapter that is right now and then (objective sft), or give a part of the points"
            if one.low is not None and one.low <= 0
            else f"{one.name} gave {one.low:g} to every completion, which teaches nothing: the "
            "model has it already, or the function does not look at the completion"
        )
    elif one.low is not None and one.low <= 0:
        yield (
            f"{one.name} gave {one.low:g} to every row's own answer: it may look for another form "
            "than the rows have"
        )


def _outweighed(own: Sequence[RewardSummary], weights: Sequence[float]) -> Iterator[str]:
    """The function whose weighted spread is much more than that of another one."""
    spread = [
        (abs(weight) * one.std, one.name)
        for one, weight in zip(own, weights, strict=True)
        if one.std and weight
    ]
    if len(spread) < 2:
        return
    (least, small), (most, large) = min(spread), max(spread)
    if most > _OUTWEIGHS * least:
        yield (
            f"{large} varies {most / least:.0f} times as much as {small}, with their weights, so "
            f"that the advantage is nearly {large}'s alone: scale it, or set weights"
        )


def _long(
    table: RewardTable, own: Sequence[RewardSummary], asked: Sequence[RewardInput]
) -> Iterator[str]:
    """Functions that give more to longer completions."""
    import torch

    lengths = torch.tensor([len(one.completion_ids) for one in asked], dtype=torch.float64)
    for one, rewards in zip(own, table.values.unbind(1), strict=True):
        given = ~rewards.isnan()
        if int(given.sum()) < 8 or not one.std or float(lengths[given].std()) == 0:
            continue
        r = float(torch.corrcoef(torch.stack([lengths[given], rewards[given]]))[0, 1])
        if r > _FOLLOWS_LENGTH:
            yield (
                f"{one.name} follows the length of the completion (correlation {r:.2f}): longer "
                "answers win whatever they say; limit it, or add overlong"
            )
