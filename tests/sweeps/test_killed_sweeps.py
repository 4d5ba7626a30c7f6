"""A sweep that is killed anywhere goes on to the table of an undisturbed one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lorakit
from small_runs import weights
from sweeps.shared_sweeps import distance
from sweeps.small_sweeps import sweep_recipe

OVER = {"lora.r": [2, 4, 8], "training.learning_rate": [1e-3, 3e-2]}

# Imports once and then forks, so that starting again takes no time.
DRIVER = """
import json, os, random, signal, sys, time
import psutil
import lorakit, lorakit.sweeps.run

values, over = json.loads(sys.argv[1])
moments, kills = random.Random(1), 0
while True:
    child = os.fork()
    if child == 0:
        lorakit.sweep(values, over=over, resume=True, quiet=True)
        os._exit(0)
    limit = moments.uniform(0.3, 1.2) + 0.1 * kills  # of its own time, however busy the machine
    while sum(psutil.Process(child).cpu_times()[:2]) < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, status
            print(kills)
            sys.exit(0)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
    assert kills < 40
"""


@pytest.mark.exhaustive
def test_whenever_it_is_killed_it_goes_on_to_the_same_table(tiny_model: Path, tmp_path: Path):
    values = sweep_recipe(tiny_model, tmp_path, "killed", save_steps=1) | {"dtype": "float64"}
    driver = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([values, OVER])],
        capture_output=True,
        text=True,
    )
    assert driver.returncode == 0, driver.stderr
    assert int(driver.stdout.splitlines()[-1]) >= 2
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
