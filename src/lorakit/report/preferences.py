"""What the page of a run that learned preferences shows more: margins, accuracy, log-probabilities.

Also how long the sample answers are before and after. All of it is empty for other runs.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from statistics import median

from lorakit.report.charts import Chart, Line, line_chart
from lorakit.report.numbers import figures
from lorakit.report.read import RunRecord

_Z = 1.959964  # of a normal distribution's middle 95 %


def preference_charts(run: RunRecord) -> list[Chart]:
    """Reward margin, preference accuracy and answers' log-probabilities over the steps."""
    charts = []
    for title, key in (("Reward margin", "margin"), ("Preference accuracy", "accuracy")):
        if not run.series("rewards/chosen") and not run.series("eval_rewards/chosen"):
            break
        lines = [
            Line("training", "line first", run.series(key)),
            Line("held out", "dots second", _held_out(run, key)),
        ]
        charts.append(line_chart(title, lines, from_zero=key == "accuracy"))
    chosen, rejected = (_held_out(run, f"logps/{kind}") for kind in ("chosen", "rejected"))
    where = "held-out answers"
    if not chosen:
        chosen, rejected = run.series("logps/chosen"), run.series("logps/rejected")
        where = "answers, training"
    lines = [Line("chosen", "line first", chosen), Line("rejected", "line second", rejected)]
    charts.append(line_chart(f"Log-probability of {where}, in nats", lines))
    return [chart for chart in charts if chart]


def preference_figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """Held-out accuracy with its interval, and the length of sample answers, as key figures."""
    return [*_accuracy(run), *_lengths(run)]


def fall_of_both(run: RunRecord) -> str:
    """A sentence where held-out chosen and rejected answers both ended less likely, or nothing.

    As the warning of a run: where the chosen ones have lost `FALLEN`, and a nat at least.
    """
    from lorakit.objectives.preference import FALLEN

    before, after = _scores(run)
    changes = [
        after[key] - before[key]
        for key in ("logps/chosen", "logps/rejected")
        if key in before and key in after
    ]
    if len(changes) < 2 or max(changes) >= 0:
        return ""
    if -changes[0] <= max(1.0, FALLEN * abs(before["logps/chosen"])):
        return ""
    return (
        f"Chosen answers became less likely, by {figures(-changes[0])} nats each, as rejected ones "
        f"did, by {figures(-changes[1])}: a wide margin alone does not say that answers are better."
    )


def wilson_interval(share: float, number: float) -> tuple[float, float]:
    """The 95 % interval of a share of so many independent rows (Wilson 1927)."""
    middle = (share + _Z**2 / (2 * number)) / (1 + _Z**2 / number)
    spread = share * (1 - share) / number + _Z**2 / (4 * number**2)
    half = _Z * math.sqrt(spread) / (1 + _Z**2 / number)
    return max(0.0, middle - half), min(1.0, middle + half)


def _accuracy(run: RunRecord) -> list[tuple[str, str, str]]:
    before, after = _scores(run)
    held_out = run.data_statistics.get("eval")
    if "accuracy" not in after or held_out is None or held_out.preferences is None:
        return []
    judged = held_out.preferences
    objective = run.manifest.recipe.get("objective") if run.manifest else None
    answers = isinstance(objective, Mapping) and objective.get("type") == "kto"
    number = judged.chosen + judged.rejected if answers else judged.chosen
    low, high = (f"{100 * end:.0f}" for end in wilson_interval(after["accuracy"], number))
    shown = f"{100 * after['accuracy']:.0f} %"
    if "accuracy" in before:
        shown = f"{100 * before['accuracy']:.0f} % → {shown}"
    noun = "answers" if answers else "pairs"
    more = f"95 % interval {low} to {high}, {number} held-out {noun}; 50 % is chance"
    return [("Preference accuracy", shown, more)]


def _lengths(run: RunRecord) -> list[tuple[str, str, str]]:
    samples = [s for s in run.samples if s.base_tokens is not None and s.tuned_tokens is not None]
    if not samples:
        return []
    base, tuned = [s.base_tokens or 0 for s in samples], [s.tuned_tokens or 0 for s in samples]
    limits = [s.most_tokens or sys.maxsize for s in samples]
    cut = [
        sum(tokens >= most for tokens, most in zip(own, limits, strict=True))
        for own in (base, tuned)
    ]
    more = f"tokens, median of {len(samples)} sample answers"
    if any(cut):
        more += f"; {cut[0]} before and {cut[1]} after end at the limit of {min(limits)}"
    return [("Answer length", f"{median(base):g} → {median(tuned):g}", more)]


def _held_out(run: RunRecord, key: str) -> list[tuple[float, float]]:
    """The held-out values, the bare base's first where there are others."""
    points = run.series(f"eval_{key}")
    before, _ = _scores(run)
    return [(0.0, before[key]), *points] if points and key in before else points


def _scores(run: RunRecord) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Held-out scores before and after, those that can be drawn."""
    manifest = run.manifest
    found = (manifest.base_eval_scores, manifest.eval_scores) if manifest else (None, None)
    before, after = (
        {name: value for name, value in (scores or {}).items() if math.isfinite(value)}
        for scores in found
    )
    return before, after
