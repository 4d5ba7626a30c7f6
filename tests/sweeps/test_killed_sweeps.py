"""A sweep that is killed anywhere goes on to the table of an undisturbed one."""

import json
from pathlib import Path

import pytest

import lorakit
from kills import kill_until_done
from small_runs import weights
from sweeps.shared_sweeps import distance
from sweeps.small_sweeps import sweep_recipe

OVER = {"lora.r": [2, 4, 8], "training.learning_rate": [1e-3, 3e-2]}


@pytest.mark.exhaustive
def test_whenever_it_is_killed_it_goes_on_to_the_same_table(tiny_model: Path, tmp_path: Path):
    values = sweep_recipe(tiny_model, tmp_path, "killed", save_steps=1) | {"dtype": "float64"}
    work = "lorakit.sweep(values[0], over=values[1], resume=True, quiet=True)"
    prepare, both = "import lorakit, lorakit.sweeps.run_sweep", [values, OVER]
    assert kill_until_done(prepare, work, both, seed=1, within=(0.3, 1.2)) >= 2
    wanted = lorakit.sweep(
        values, f"output_dir={tmp_path / 'whole'}", over=OVER, resume=True, quiet=True
    )
    table = json.loads((tmp_path / "killed" / "leaderboard.json").read_text())
    assert [row["name"] for row in table["configurations"]] == [row["name"] for row in wanted]
    for row, other in zip(table["configurations"], wanted, strict=True):
        assert row["step"] == other["step"]
        assert row["report"] == pytest.approx(other["report"], rel=1e-9)
        own, its = (weights(tmp_path / way / row["name"]) for way in ("killed", "whole"))
        assert distance(own, its) < 1e-9
    left = [path.name for path in (tmp_path / "killed").rglob("*")]
    assert not [name for name in left if name.startswith(("checkpoint-", ".ranks", ".leader"))]
    assert {p.name for p in (tmp_path / "killed").iterdir() if not p.name.startswith(".")} == {
        p.name for p in (tmp_path / "whole").iterdir()
    }
