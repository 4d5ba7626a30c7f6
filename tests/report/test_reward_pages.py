"""The page of a run that learned from rewards."""

import json
import re
from pathlib import Path

import pytest
from folders import save_rewarded_run, save_run
from test_page import Page

from lorakit.bootstrap import mean_interval
from lorakit.report.completions import read_completions, read_held_out
from lorakit.report.run_page import write_report


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_rewarded_run(tmp_path_factory.mktemp("runs") / "orders")


def test_rewards_have_curves_with_intervals_and_held_out_rewards_before_and_after(rewarded: Path):
    report = write_report(rewarded)
    page = Page(report)
    assert report.notices == []
    assert "rewards" in page.ids()
    titles = page.headings()
    assert titles[:3] == ["Reward", "valid_json", "right_fields"]
    for words in ("Completion length", "Entropy", "Groups with signal", "Gap between sampling"):
        assert any(title.startswith(words) for title in titles), words
    assert page.html.count('class="band"') == 3
    held_out = read_held_out(rewarded, [])
    assert held_out is not None
    difference = held_out.interval("tuned", -1, minus="base")
    assert difference is not None
    assert difference.low > 0
    assert "The held-out reward rose from" in page.text
    assert "Held-out loss" not in page.text
    assert "weighted sum" in page.text


def test_intervals_are_drawn_over_groups_and_leave_out_what_is_none(rewarded: Path):
    steps = read_completions(rewarded, [])
    groups = [g for g in steps[0].groups if g.values[0][1] is not None]
    assert len(groups) == 3
    pairs = [(sum(v[1] or 0 for v in g.values), len(g.values)) for g in groups]
    found = mean_interval(pairs)
    assert found.low <= found.mean <= found.high
    assert found.mean == pytest.approx(sum(s for s, _ in pairs) / 24)


def test_early_and_late_completions_of_a_prompt_stand_side_by_side(rewarded: Path):
    page = Page(write_report(rewarded))
    shown = re.findall(r"<h4>Step (\d+) <span>(orders\.jsonl:\d+)", page.html)
    assert len(shown) == 8
    for (early, where), (late, other) in zip(shown[::2], shown[1::2], strict=True):
        assert where == other
        assert int(early) < int(late)
    assert "right_fields" in page.text


def test_damaged_lines_are_counted_and_other_runs_have_no_rewards(tmp_path: Path):
    folder = save_rewarded_run(tmp_path / "run", steps=3)
    with (folder / "completions.jsonl").open("a") as file:
        file.write('{"step": 4, "rewards": ["a"], "groups": [{"val')
    (folder / "held_out_rewards.json").write_text("[")
    report = write_report(folder)
    assert len(report.notices) == 2
    assert "rewards" in Page(report).ids()
    assert "rewards" not in Page(write_report(save_run(tmp_path / "plain"))).ids()


def test_without_held_out_prompts_the_reward_while_training_is_told(tmp_path: Path):
    folder = save_rewarded_run(tmp_path / "run", steps=20)
    (folder / "held_out_rewards.json").unlink()
    logged = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in logged if "eval_reward" not in line]
    (folder / "metrics.jsonl").write_text("\n".join(kept))
    page = Page(write_report(folder))
    assert "The reward of sampled completions went from" in page.text
    assert "first and last 2 logged steps" in page.text
    assert "No prompts were held out" in page.text


def test_text_of_a_completion_never_becomes_markup(tmp_path: Path):
    folder = save_rewarded_run(tmp_path / "run", steps=2)
    text = (folder / "completions.jsonl").read_text()
    evil = "<script>alert(1)</script>"
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        line["rewards"] = [evil, evil]
        for group in line["groups"]:
            group |= {"prompt": evil, "completion": evil, "where": evil}
    (folder / "completions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    page = Page(write_report(folder))
    assert page.text.count(evil) >= 4
    assert "script" not in {tag for tag, _ in page.tags}
