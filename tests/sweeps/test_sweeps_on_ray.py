"""Groups on the workers of a Ray cluster of this machine, in the same folder."""

from pathlib import Path

import pytest

import lorakit
from lorakit.errors import LorakitError
from small_runs import weights
from sweeps.shared_sweeps import distance
from sweeps.small_sweeps import sweep_recipe

pytest.importorskip("ray", reason="ray is not installed")


def test_two_workers_give_the_table_of_one_process(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Workers import what this process imports, and look at paths from its folder.
    monkeypatch.setenv("PYTHONPATH", str(Path(lorakit.__file__).parents[1]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.chdir(tmp_path)
    values = sweep_recipe(tiny_model, tmp_path, max_steps=9) | {"dtype": "float64"}
    values["data"]["train"] = "sayings.jsonl"
    over = {"lora.r": [2, 3, 4], "training.learning_rate": [3e-2, 1e30]}
    found = {}
    for engine, own in (("together", {}), ("ray", {"workers": 2})):
        values["output_dir"] = engine
        found[engine] = lorakit.sweep(values, over=over, engine=engine, quiet=True, **own)
    assert [r["name"] for r in found["ray"]] == [r["name"] for r in found["together"]]
    for row, other in zip(found["ray"], found["together"], strict=True):
        assert (row["status"], row["step"]) == (other["status"], other["step"])
        if row["diverged"] is None:
            assert row["report"] == pytest.approx(other["report"], rel=1e-8)
            assert (
                distance(weights(Path("ray") / row["name"]), weights(Path(other["folder"]))) < 1e-8
            )


def test_what_goes_wrong_in_a_worker_is_said_as_here(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(Path(lorakit.__file__).parents[1]))
    values = sweep_recipe(tiny_model, tmp_path, max_steps=2)
    values["training"]["optim"] = "galore_adamw"  # whose library is found missing when it is made
    with pytest.raises(LorakitError, match="galore") as caught:
        lorakit.sweep(values, over={"lora.r": [2, 3]}, engine="ray", workers=1, quiet=True)
    assert "\n" not in str(caught.value)
