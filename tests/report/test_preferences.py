"""The page of a run that learned preferences."""

import json
from pathlib import Path
from typing import Any

import pytest
from folders import save_run, save_samples

from lorakit.report.preferences import wilson_interval
from lorakit.report.run_page import write_report

FIGURES = {"chosen": 20, "rejected": 20}
BEFORE = {"accuracy": 0.5, "margin": 0.0, "logps/chosen": -40.0, "logps/rejected": -50.0}


def page(folder: Path, after: dict[str, float], objective: str = "dpo", **figures: int) -> str:
    """The report of a run with these held-out scores in its record."""
    save_run(folder)
    record = json.loads((folder / "lorakit.json").read_text())
    record["data_statistics"]["eval"]["preferences"] = FIGURES | figures
    record |= {"base_eval_scores": BEFORE, "eval_scores": after}
    record["recipe"]["objective"] = {"type": objective, "beta": 0.1}
    (folder / "lorakit.json").write_text(json.dumps(record))
    lines = [
        {"step": step, "loss": 0.6, "margin": 0.1 * step, "accuracy": 0.6, "rewards/chosen": 0.1}
        | {"logps/chosen": -40.0 - step, "logps/rejected": -50.0 - 2 * step}
        for step in range(1, 6)
    ]
    lines.append({"step": 5, "eval_loss": 0.5, **{f"eval_{k}": v for k, v in after.items()}})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return write_report(folder).path.read_text()


def test_margins_accuracy_with_its_interval_and_log_probabilities_are_shown(tmp_path: Path):
    after = BEFORE | {"accuracy": 0.75, "margin": 0.4, "logps/chosen": -38.0}
    html = page(tmp_path / "run", after)
    for words in (
        "Reward margin", "Preference accuracy", "Log-probability of held-out answers, in nats",
        "50 % → 75 %", "95 % interval 53 to 89, 20 held-out pairs; 50 % is chance",
        "nats a pair, base → adapter",
    ):  # fmt: skip
        assert words in html, words
    assert "became less likely" not in html


def test_answers_of_both_kinds_that_became_less_likely_are_said(tmp_path: Path):
    after = BEFORE | {"logps/chosen": -52.0, "logps/rejected": -80.0}
    html = page(tmp_path / "run", after)
    assert "Chosen answers became less likely, by 12.0 nats each" in html
    assert "by 30.0" in html
    after = BEFORE | {"logps/chosen": -41.5, "logps/rejected": -80.0}
    assert "became less likely" not in page(tmp_path / "little", after)


def test_the_accuracy_of_judged_answers_is_that_of_answers(tmp_path: Path):
    html = page(tmp_path / "run", BEFORE | {"accuracy": 0.5}, "kto", chosen=30, rejected=10)
    assert "40 held-out answers" in html


def test_the_length_of_sample_answers_before_and_after_is_shown_with_those_that_were_cut(
    tmp_path: Path,
):
    folder = save_run(tmp_path / "run")
    assert "Answer length" not in write_report(folder).path.read_text()
    save_samples(folder, [("Q", "A", "before", "after")] * 3)
    samples: list[dict[str, Any]] = json.loads((folder / "samples.json").read_text())
    for sample, tokens in zip(samples, ((10, 256), (12, 80), (30, 0)), strict=True):
        sample |= {"base_tokens": tokens[0], "tuned_tokens": tokens[1], "most_tokens": 256}
    (folder / "samples.json").write_text(json.dumps(samples))
    html = write_report(folder).path.read_text()
    assert "12 → 80" in html
    assert "median of 3 sample answers; 0 before and 1 after end at the limit of 256" in html


@pytest.mark.parametrize(
    ("share", "number", "ends"),
    [(0.5, 100, (0.4038, 0.5962)), (1.0, 10, (0.7225, 1.0)), (0.0, 10, (0.0, 0.2775))],
)
def test_an_interval_of_a_share_is_wilsons(share: float, number: int, ends: tuple[float, float]):
    assert wilson_interval(share, number) == pytest.approx(ends, abs=1e-4)
