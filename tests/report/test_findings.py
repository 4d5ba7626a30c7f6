"""The sentences follow from the numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folders import save_run

from lorakit.adapters.spectrum import Spectrum
from lorakit.report.findings import rank_advice, verdict
from lorakit.report.read import RunRecord, read_run


@pytest.fixture
def run(tmp_path: Path) -> RunRecord:
    return read_run(save_run(tmp_path / "run"))


def with_losses(run: RunRecord, before: float | None, after: float | None) -> RunRecord:
    assert run.manifest
    update: dict[str, Any] = {"base_eval_loss": before, "eval_loss": after}
    return replace(run, manifest=run.manifest.model_copy(update=update))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (2.5, 0.5, "fell from 2.50 to 0.500, by 80 %."),
        (2.5, 2.6, "rose from 2.50 to 2.60: on new rows the adapter is worse than the base"),
        (2.5, 2.49, "stayed the same (from 2.50 to 2.49)"),
        (None, None, "No rows were held out"),
        (2.5, float("nan"), "it is NaN or Inf"),
    ],
)
def test_the_verdict_says_what_happened_to_the_held_out_loss(
    run: RunRecord, before: float | None, after: float | None, said: str
):
    assert said in verdict(with_losses(run, before, after))


def test_a_held_out_loss_that_rose_again_is_said_with_its_best_step(run: RunRecord):
    lines = [{"step": s, "eval_loss": loss} for s, loss in ((5.0, 0.9), (10.0, 0.6), (15.0, 0.8))]
    learned = with_losses(replace(run, metrics=lines), 2.0, 0.8)
    assert "It was lowest, 0.600, at step 10 and rose again" in verdict(learned)
    assert "lowest" not in verdict(with_losses(replace(run, metrics=lines[:2]), 2.0, 0.6))


def modules(r: int, *used: int) -> list[Spectrum]:
    """A module for each of `used`, with so many equal directions."""
    return [
        Spectrum(f"l.{i}.q", r, (64, 64), 1.0, (1.0,) * k + (0.0,) * (r - k))
        for i, k in enumerate(used)
    ]


@pytest.mark.parametrize(
    ("spectra", "said"),
    [
        (modules(16, 15, 14, 13), "about 14 of 16 directions: a larger r may help"),
        (modules(16, 3, 3, 4, 5), "at most 3.5 of 16 directions: r = 8 would do"),
        (modules(16, 1, 1, 1), "r = 1 would do"),
        (modules(16, 2, 2, 2, 16), "some need all that they have"),
        (modules(16, 8, 9, 10), "neither few nor all: r is about right"),
        (modules(16, 0, 0), "every ΔW here is zero"),
        (modules(4, 4) + modules(8, 8, 8), "of 4 to 8 directions: a larger r may help"),
    ],
)
def test_the_advice_on_r_follows_from_the_effective_ranks(spectra: list[Spectrum], said: str):
    assert said in rank_advice(spectra)
