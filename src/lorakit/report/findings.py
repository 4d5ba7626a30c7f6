"""What the numbers of a run say, in sentences: did it learn, was the rank too small or too large.

Every threshold is a constant here, and the page tells it to the reader.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from statistics import median, median_high

from lorakit.adapters.manifest import Manifest
from lorakit.adapters.spectrum import Spectrum
from lorakit.errors import InputError
from lorakit.report.numbers import count, duration, figures, memory, short_count
from lorakit.report.read import RunRecord

CROWDED = 0.8
"""A module whose effective rank is this share of r or more uses about all of its directions."""
SPARSE = 0.25
"""A module whose effective rank is this share of r or less uses few of them."""
FEW_STEPS = 100
"""After fewer steps all directions are still near their random start: the advice says so."""
SAME = 0.01
"""Losses whose ratio differs from 1 by less are called the same."""
RISEN = 0.02
"""A held-out loss is said to have risen again when it ends this share above its lowest."""


def verdict(run: RunRecord) -> str:
    """One or two sentences: what the run did to the loss, and whether it went on too long."""
    if run.manifest and "reward" in (run.manifest.eval_scores or {}):
        return _of_rewards(run.manifest)
    before, after = (
        (first_loss(run.manifest), run.manifest.eval_loss) if run.manifest else (None, None)
    )
    if before is None or after is None:
        losses = [loss for _, loss in run.series("loss")]
        if not losses:
            return "What this adapter learned was not recorded here; what it changes is below."
        return (
            f"The training loss went from {figures(losses[0])} to {figures(losses[-1])}. "
            "No rows were held out, so whether it helps with new rows is not known."
        )
    said = f"from {figures(before)} to {figures(after)}"
    if not (math.isfinite(before) and math.isfinite(after)):
        return f"The held-out loss went {said}: it is NaN or Inf, so the adapter is of no use."
    if abs(after - before) < SAME * before:
        return f"The held-out loss stayed the same ({said}): the adapter learned next to nothing."
    if after > before:
        first = "base" if run.manifest and run.manifest.parent is None else "one it started from"
        return f"The held-out loss rose {said}: on new rows the adapter is worse than the {first}."
    sentence = f"The held-out loss fell {said}, by {100 * (1 - after / before):.0f} %."
    return f"{sentence} {_rose_again(run, after)}".strip()


def _of_rewards(manifest: Manifest) -> str:
    """What the run did to the reward of held-out prompts."""
    first = manifest.start_eval_scores or manifest.base_eval_scores or {}
    before, after = first.get("reward", math.nan), (manifest.eval_scores or {})["reward"]
    said = f"from {figures(before)} to {figures(after)}"
    if abs(after - before) < SAME * max(abs(before), abs(after)) or before == after:
        return f"The held-out reward stayed the same ({said}): the adapter learned next to nothing."
    verb = "rose" if after > before else "fell"
    return f"The held-out reward {verb} {said}."


def first_loss(manifest: Manifest) -> float | None:
    """The held-out loss before training: of the adapter that the run started from, or the base."""
    start = manifest.start_eval_loss
    return manifest.base_eval_loss if start is None else start


def _rose_again(run: RunRecord, after: float) -> str:
    losses = run.series("eval_loss")
    if not losses:
        return ""
    step, lowest = min(losses, key=lambda point: point[1])
    if step == losses[-1][0] or after <= lowest * (1 + RISEN):
        return ""
    return f"It was lowest, {figures(lowest)}, at step {step:g} and rose again: fewer steps do."


def key_figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """The run's few main numbers: name, value, and what more there is to say."""
    found: list[tuple[str, str, str]] = []
    if (m := run.manifest) is not None:
        if m.eval_loss is not None and m.base_eval_loss is not None:
            losses, names = [m.base_eval_loss, m.eval_loss], "base → adapter"
            if m.start_eval_loss is not None:
                losses.insert(1, m.start_eval_loss)
                names = "base → start → adapter"
            chain = " → ".join(figures(loss) for loss in losses)
            found.append(("Held-out loss", chain, f"nats a {unit(m)}, {names}"))
        learned = f"{short_count(m.supervised_tokens)} of them learned"
        found.append(("Tokens", short_count(m.train_tokens), learned))
        rate = f"{count(m.steps)} steps, {count(m.tokens_per_second)} tokens/s"
        found.append(("Training time", duration(m.train_seconds), rate))
        found.append(("Peak memory", memory(m.peak_memory_mb), "of the process, or of its GPU"))
    modules = len(run.spectra)
    where = f"{modules} {'module' if modules == 1 else 'modules'}, r = {ranks(run.spectra)}"
    found.append(("Trained parameters", short_count(run.parameters), where if modules else ""))
    return found


def unit(manifest: Manifest | None) -> str:
    """What the losses of a run are divided by, in words."""
    objective = manifest.recipe.get("objective") if manifest else None
    if isinstance(objective, dict):
        from lorakit.objectives.registry import objective_class

        with suppress(InputError):  # of a package that is not imported here
            unit = objective_class(str(objective.get("type"))).unit
            return "learned token" if unit == "supervised token" else unit
    return "learned token"


def ranks(spectra: Sequence[Spectrum]) -> str:
    """The rank of the modules, or the smallest and the largest."""
    found = sorted({s.r for s in spectra})
    return " to ".join(str(r) for r in dict.fromkeys((found[0], found[-1]))) if found else "–"


def rank_advice(spectra: Sequence[Spectrum], steps: int | None = None) -> str:
    """Whether r was too small, too large, or about right; a caution where `steps` are few.

    Too small where most modules use `CROWDED` of their directions. Too large where half of them
    use `SPARSE` or less; r is then the power of two that nine in ten modules keep within.
    """
    moved = [s for s in spectra if s.norm > 0]
    if not moved:
        return "No update to judge: every ΔW here is zero."
    few = steps is not None and steps < FEW_STEPS
    caution = f" After only {steps} steps this can still change." if few else ""
    return _judgement(moved) + caution


def _judgement(moved: Sequence[Spectrum]) -> str:
    share = median(s.effective_rank / s.r for s in moved)
    typical = median(s.effective_rank for s in moved)
    uses = f"{figures(typical, 2)} of {ranks(moved)} directions"
    if share >= CROWDED:
        return f"Most modules use about {uses}: a larger r may help."
    if share > SPARSE:
        return f"A typical module uses {uses}, neither few nor all: r is about right."
    within = sorted(s.effective_rank for s in moved)[math.ceil(0.9 * len(moved)) - 1]
    enough = 2 ** math.ceil(math.log2(max(1.0, within)))
    half = f"Half of the modules use at most {uses}"
    if enough < max(s.r for s in moved):
        return f"{half}: r = {enough} would do."
    return f"{half}, but some need all that they have: r fits those."


def nearly_largest(values: Iterable[float]) -> float:
    """The value that 95 in 100 keep within: a scale's end that one outlier does not decide."""
    found = sorted(values)
    return found[math.ceil(0.95 * len(found)) - 1] if found else 0.0


def directions(spectra: Sequence[Spectrum]) -> str:
    """How many directions hold most of the squared norm, in a typical module."""
    moved = [s for s in spectra if s.norm > 0]
    if not moved:
        return ""
    most, nearly_all = (median_high(s.directions(share) for s in moved) for share in (0.9, 0.99))
    return (
        f"In a typical module 90 % of ‖ΔW‖² lies in {most} of {ranks(moved)} directions, "
        f"99 % in {nearly_all}."
    )
