"""What the page of a run that learned from rewards shows more: rewards with intervals, lengths,
entropy, groups with signal, and how far sampling and training are apart.

All of it is empty for other runs. Intervals are those of a bootstrap over groups, the completions
of one prompt; held-out ones over rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.bootstrap import Interval
from lorakit.report.charts import Band, Chart, Line, line_chart
from lorakit.report.completions import (
    HeldOutRewards,
    StepCompletions,
    curve,
    early_and_late,
    read_completions,
    read_held_out,
)
from lorakit.report.numbers import figures
from lorakit.report.read import RunRecord

GAP = 2e-2
"""Nats by which log-probabilities of sampling and training may differ in bfloat16."""
_MOST_FUNCTIONS = 8
_MOST_PAIRS = 4


@dataclass(frozen=True)
class RewardPage:
    """What the page of a run with rewards says more.

    Attributes:
        charts: over the steps.
        key_figures: name, value and what more there is to say.
        verdict: what the run did to the held-out reward; empty where none was measured.
        table: of each reward its name, before, after, and the difference with its interval.
        pairs: early and late completions with their rewards.
    """

    charts: list[Chart]
    key_figures: list[tuple[str, str, str]]
    verdict: str
    table: list[tuple[str, str, str, str]]
    pairs: list[list[dict[str, Any]]]


def reward_page(run: RunRecord) -> RewardPage | None:
    """The page's part of a run with rewards; None for other runs."""
    if not run.series("reward"):
        return None
    steps = read_completions(run.folder, run.notices)
    held_out = read_held_out(run.folder, run.notices)
    first = "start" if held_out and "start" in held_out.states else "base"
    return RewardPage(
        _charts(run, steps, held_out, first),
        _key_figures(run, held_out, first),
        _verdict(held_out, first) if held_out else _verdict_of_training(run),
        _table(held_out, first),
        early_and_late(steps, _MOST_PAIRS),
    )


def _charts(
    run: RunRecord, steps: list[StepCompletions], held_out: HeldOutRewards | None, first: str
) -> list[Chart]:
    """Those of each reward, and of what tells how the run is going."""
    names = steps[0].rewards if steps else _names(run)

    def of_reward(name: str | None, title: str) -> Chart | None:
        column = -1 if name is None else names.index(name)
        before = held_out.interval(first, column) if held_out else None
        begin = [] if before is None else [(0.0, before.mean)]
        return _reward_chart(run, steps, name, title, begin)

    charts = [of_reward(None, "Reward")]
    if len(names) > 1:
        charts += [of_reward(name, name) for name in names[:_MOST_FUNCTIONS]]
    signal = [(step, 1 - value) for step, value in run.series("frac_reward_zero_std")]
    gap = "sampling/sampling_logp_difference"
    for title, lines, from_zero in (
        (
            "Completion length, in tokens",
            [
                Line("mean", "line first", run.series("completions/mean_length")),
                Line("held out", "dots second", run.series("eval_completions/mean_length")),
            ],
            True,
        ),
        (
            "Completions cut off at the limit of tokens, share",
            [Line("training", "line first", run.series("completions/clipped_ratio"))],
            True,
        ),
        ("Entropy, in nats a token", [Line("", "line first", run.series("entropy"))], True),
        ("Groups with signal, share", [Line("", "line first", signal)], True),
        ("KL from the reference, in nats a token", [Line("", "line", run.series("kl"))], True),
        (
            "Gap between sampling and training, in nats a token",
            [
                Line("mean", "line first", run.series(f"{gap}/mean")),
                Line("largest", "dots second", run.series(f"{gap}/max")),
            ],
            False,
        ),
        (
            "Tokens sampled per second",
            [Line("", "line first", run.series("sampled_tokens_per_second"))],
            True,
        ),
    ):
        named = [Line(x.name or "training", x.kind, x.points) for x in lines]
        charts.append(line_chart(title, named, from_zero=from_zero))
    return [chart for chart in charts if chart]


def _names(run: RunRecord) -> list[str]:
    keys = {key: None for line in run.metrics for key in line}
    return [
        key.removeprefix("rewards/").removesuffix("/mean")
        for key in keys
        if key.startswith("rewards/") and key.endswith("/mean")
    ]


def _reward_chart(
    run: RunRecord,
    steps: list[StepCompletions],
    name: str | None,
    title: str,
    begin: list[tuple[float, float]],
) -> Chart | None:
    """A reward over the steps, with its interval; `begin` is the held-out one before."""
    key = "reward" if name is None else f"rewards/{name}/mean"
    found = curve(steps, name)
    points = [(step, interval.mean) for step, interval in found] or run.series(key)
    band = Band(
        "95 % interval",
        [(step, interval.low) for step, interval in found],
        [(step, interval.high) for step, interval in found],
    )
    lines = [
        Line("training", "line first", points),
        Line("held out", "dots second", [*begin, *run.series(f"eval_{key}")]),
    ]
    return line_chart(title, lines, bands=[band] if found else [])


def _key_figures(
    run: RunRecord, held_out: HeldOutRewards | None, first: str
) -> list[tuple[str, str, str]]:
    found = []
    if held_out is not None and (after := held_out.interval("tuned", -1)) is not None:
        before = held_out.interval(first, -1)
        value = figures(after.mean)
        if before is not None:
            value = f"{figures(before.mean)} → {value}"
        rows = len(held_out.states["tuned"])
        more = f"95 % interval {_ends(after)}, {rows} prompts, one completion each"
        found.append(("Held-out reward", value, more))
    for key, name in (("completions/mean_length", "Completion length"), ("entropy", "Entropy")):
        if points := run.series(key):
            unit = "tokens, mean" if key.startswith("completions") else "nats a token"
            value = f"{figures(points[0][1])} → {figures(points[-1][1])}"
            found.append((name, value, f"{unit}, first and last logged step"))
    if gaps := run.series("sampling/sampling_logp_difference/max"):
        most = max(value for _, value in gaps)
        more = "nats, largest of any token between sampling and training"
        found.append(("Gap", figures(most), more))
    return found


def _verdict_of_training(run: RunRecord) -> str:
    """What became of the reward while training, where no prompt was held out."""
    found = [value for _, value in run.series("reward")]
    if len(found) < 2 or run.series("eval_reward"):
        return ""
    size = max(1, len(found) // 10)
    first, last = (sum(part) / size for part in (found[:size], found[-size:]))
    logged = "first and last logged step" if size == 1 else f"first and last {size} logged steps"
    return (
        f"The reward of sampled completions went from {figures(first)} to {figures(last)} "
        f"({logged}). No prompts were held out, so whether it holds for new ones is not known."
    )


def _verdict(held_out: HeldOutRewards, first: str) -> str:
    """One sentence: what the run did to the reward of held-out prompts."""
    before, after = held_out.interval(first, -1), held_out.interval("tuned", -1)
    difference = held_out.interval("tuned", -1, minus=first)
    if before is None or after is None or difference is None:
        return ""
    what = "that it started from" if first == "start" else "base"
    said = f"from {figures(before.mean)} to {figures(after.mean)}"
    ends = f"the 95 % interval of the difference is {_ends(difference)}"
    if difference.holds_zero:
        return (
            f"The held-out reward went {said}, which may be chance: {ends}. More held-out prompts "
            "or more steps would tell."
        )
    way = "rose" if difference.mean > 0 else "fell"
    worse = "" if difference.mean > 0 else f", worse than the {what}"
    return f"The held-out reward {way} {said}{worse}: {ends}."


def _table(held_out: HeldOutRewards | None, first: str) -> list[tuple[str, str, str, str]]:
    if held_out is None:
        return []
    rows = []
    for column, name in [*enumerate(held_out.rewards), (-1, "weighted sum")]:
        difference = held_out.interval("tuned", column, minus=first)
        ends = "" if difference is None else f"{figures(difference.mean)} ({_ends(difference)})"
        before, after = (_mean(held_out.interval(state, column)) for state in (first, "tuned"))
        rows.append((name, before, after, ends))
    return rows if len(held_out.rewards) > 1 else rows[:1]


def _mean(interval: Interval | None) -> str:
    return "–" if interval is None else f"{figures(interval.mean)} ({_ends(interval)})"


def _ends(interval: Interval) -> str:
    return f"{figures(interval.low)} to {figures(interval.high)}"


def shown_rewards(rewards: Mapping[str, float | None]) -> str:
    """`valid_json 1, right None`"""
    return ", ".join(
        f"{name} {'None' if value is None else figures(value)}" for name, value in rewards.items()
    )
