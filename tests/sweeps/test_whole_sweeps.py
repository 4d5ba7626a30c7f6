"""Sweeps from a recipe to a table: what is trained, what is left, and what is said of it."""

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit.adapters.manifest import read_manifest
from lorakit.adapters.open import open_adapter
from lorakit.data.dataset import load_samples
from lorakit.errors import InputError
from lorakit.evaluation.held_out import mean_loss
from lorakit.sweeps.sweep_base import load_base
from lorakit.training.recipe import load_recipe
from matrix import few
from small_runs import weights
from sweeps.shared_sweeps import distance
from sweeps.small_sweeps import sayings, sweep_recipe

OVER = {"lora.r": [2, 6], "training.learning_rate": [1e-3, 3e-2, 1e30]}


@pytest.fixture(scope="module")
def swept(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A sweep of six, of which two diverge: folder, recipe, and what was returned."""
    folder = tmp_path_factory.mktemp("swept")
    values = sweep_recipe(tiny_model, folder) | {"dtype": "float64"}
    return folder / "sweep", values, lorakit.sweep(values, over=OVER, quiet=True)


def test_losers_stop_early_and_what_diverges_is_dropped_alone(swept: Any):
    folder, _, rows = swept
    statuses = ["winner", *["stopped"] * 3, *["diverged"] * 2]
    assert [row["status"] for row in rows] == statuses
    by_name = {row["name"]: row for row in rows}
    assert {row["name"] for row in rows[:2]} == {"r2-lr0.03", "r6-lr0.03"}
    assert (rows[0]["step"], rows[0]["share"]) == (27, 1)
    assert [(row["step"], row["share"]) for row in rows[1:4]] == [(9, 1 / 3)] * 3
    for name in ("r2-lr1e30", "r6-lr1e30"):
        assert "is nan at step" in by_name[name]["diverged"]
        assert by_name[name]["report"] is None
        assert not (folder / name / "adapter_model.safetensors").exists()
    table = json.loads((folder / "leaderboard.json").read_text())
    assert table["configurations"] == rows
    steps = table["steps"]
    assert steps["done"] == sum(row["step"] for row in rows)
    assert steps["saved"] == pytest.approx(1 - steps["done"] / (6 * 27))
    assert not list(folder.glob("*/checkpoint-*"))
    assert not list(folder.glob(".*"))


def test_every_adapter_is_there_and_gives_the_losses_of_its_record(swept: Any):
    folder, values, rows = swept
    recipe = load_recipe(values)
    ground = load_base(recipe, 0.5, recipe.training.seed)
    base = json.loads((folder / "leaderboard.json").read_text())["base"]
    for row in rows[:4]:
        opened = open_adapter(folder / row["name"], dtype="float64")
        for split, part in ground.splits.items():
            mean = mean_loss(opened.model, opened.tokenizer, part.samples)
            assert mean == pytest.approx(row[split]["mean"], rel=1e-9)
            assert mean == pytest.approx(row["rungs"][-1][split], rel=1e-9)
        manifest = read_manifest(folder / row["name"])
        assert manifest.steps == row["step"]
        everything = [s for part in ground.splits.values() for s in part.samples]
        whole = mean_loss(opened.model, opened.tokenizer, everything)
        assert manifest.eval_loss == pytest.approx(whole, rel=1e-9)
        bare = sum(base[split]["mean"] for split in base) / len(base)
        assert manifest.base_eval_loss == pytest.approx(bare, rel=0.05)
        stopped = [n for n in manifest.notices if n.startswith("stopped by the sweep at step 9")]
        assert bool(stopped) == (row["status"] == "stopped")


def test_choosing_and_reporting_see_different_rows(swept: Any):
    _, values, _ = swept
    recipe = load_recipe(values)
    parts = load_base(recipe, 0.5, recipe.training.seed).splits
    prompts = [{s.prompt_key for s in part.samples} for part in parts.values()]
    assert [len(own) for own in prompts] == [16, 16]
    assert not prompts[0] & prompts[1]


def test_the_winners_recipe_gives_the_winner_again(swept: Any, tmp_path: Path):
    folder, _, rows = swept
    text = (folder / "recipe.yaml").read_text()
    assert text.startswith(f"# {rows[0]['name']}, the winner")
    recipe = folder / "recipe.yaml"
    again = lorakit.train(recipe, f"output_dir={tmp_path / 'again'}", quiet=True)
    own = weights(folder / rows[0]["name"])
    assert distance(own, weights(again.output_dir)) < 1e-9
    assert again.eval_loss == pytest.approx(read_manifest(folder / rows[0]["name"]).eval_loss)


def test_the_winner_is_cut_to_the_smallest_rank_that_keeps_the_gain(swept: Any):
    folder, values, rows = swept
    table = json.loads((folder / "leaderboard.json").read_text())
    ranks, winner = table["ranks"], rows[0]
    kept = [result["kept"]["selection"] for result in ranks["results"]]
    assert [result["r"] for result in ranks["results"]] == sorted(
        result["r"] for result in ranks["results"]
    )
    assert kept == sorted(kept)
    recipe = load_recipe(values)
    parts = load_base(recipe, 0.5, recipe.training.seed).splits
    if ranks["chosen"] is None:
        assert max(kept) < 0.99
        assert "no smaller rank" in ranks["line"]
        return
    r = ranks["chosen"]["r"]
    assert ranks["line"].startswith(f"r={winner['changes']['lora.r']} trained, r={r} keeps ")
    small = open_adapter(folder / f"{winner['name']}-as-r{r}", dtype="float64")
    mean = mean_loss(small.model, small.tokenizer, parts["report"].samples)
    assert mean == pytest.approx(ranks["chosen"]["report"], rel=1e-6)
    base = table["base"]["report"]["mean"]
    share = (base - mean) / (base - winner["report"]["mean"])
    assert ranks["chosen"]["kept"]["report"] == pytest.approx(share, rel=1e-4)


def test_a_finished_sweep_is_given_back_as_it_is(swept: Any):
    folder, values, rows = swept
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert lorakit.sweep(values, over=OVER, resume=True, quiet=True) == rows
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(InputError, match="holds a finished sweep"):
        lorakit.sweep(values, over=OVER, quiet=True)


def test_without_pruning_all_come_to_their_end_and_either_engine_gives_the_same(
    tiny_model: Path, tmp_path: Path
):
    values = sweep_recipe(tiny_model, tmp_path, max_steps=6) | {"dtype": "float64"}
    over = {"lora.r": [2, 3], "lora.lora_dropout": [0.0, 0.2], "training.seed": [5]}
    found = {}
    for engine in ("together", "solo"):
        values["output_dir"] = str(tmp_path / engine)
        rows = lorakit.sweep(values, over=over, prune=False, engine=engine, quiet=True)
        assert {row["step"] for row in rows} == {6}
        assert [row["status"] for row in rows] == ["winner", *["finished"] * 3]
        found[engine] = rows
    for row, other in zip(found["together"], found["solo"], strict=True):
        assert row["name"] == other["name"]
        assert row["report"] == pytest.approx(other["report"], rel=1e-8)
        own, wanted = (weights(tmp_path / e / row["name"]) for e in ("together", "solo"))
        assert distance(own, wanted) < 1e-8
    # The seed was swept, and the same rows were held out for all: those of the recipe's own seed.
    recipe = (tmp_path / "solo" / "recipe.yaml").read_text()
    assert "  seed: 42\n" in recipe.partition("training:")[0]


def test_settings_that_are_alike_are_called_alike(tiny_model: Path, tmp_path: Path):
    values = sweep_recipe(tiny_model, tmp_path, max_steps=2)
    # Neither clips anything.
    rows = lorakit.sweep(values, over={"training.max_grad_norm": [50, 60]}, quiet=True)
    assert rows[1]["no_difference"]
    assert rows[1]["behind"]["low"] <= 0 <= rows[1]["behind"]["high"]
    table = json.loads((tmp_path / "sweep" / "leaderboard.json").read_text())
    assert "No difference was found to" in table["verdict"]
    assert any("only 16 prompts to choose by" in line for line in table["notices"])


@pytest.mark.exhaustive
def test_samplers_go_in_rounds_and_later_ones_are_measured_by_the_earlier(
    tiny_model: Path, tmp_path: Path
):
    pytest.importorskip("optuna")
    values = sweep_recipe(tiny_model, tmp_path, max_steps=9)
    rows = lorakit.sweep(
        values,
        over={"training.learning_rate": {"low": 1e-4, "high": 1e-1}, "lora.r": [1, 2]},
        sampler="tpe",
        trials=10,
        quiet=True,
    )
    assert len(rows) == 10
    assert rows[0]["step"] == 9
    assert 1 <= sum(row["step"] == 9 for row in rows) <= 6
    assert rows[0]["changes"]["training.learning_rate"] > 1e-3


def test_a_metric_of_answers_may_be_what_is_chosen_by(tiny_model: Path, tmp_path: Path):
    values = sweep_recipe(tiny_model, tmp_path, max_steps=12, learning_rate=5e-2)
    rows = lorakit.sweep(
        values, over={"lora.r": [2, 8]}, objective="rouge", prune=False, quiet=True
    )
    scores = [row["selection"]["mean"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert (tmp_path / "sweep" / rows[0]["name"] / "sweep-answers.json").is_file()


def test_too_few_rows_held_out_are_refused_before_anything_is_written(
    tiny_model: Path, tmp_path: Path
):
    values = sweep_recipe(tiny_model, tmp_path)
    values["data"]["eval"] = 0.1
    with pytest.raises(InputError, match="with 10 prompts are too few to tell settings apart"):
        lorakit.sweep(values, over=OVER, quiet=True)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("key", "wrong"), [("lora.target_modules", ["q_porj"]), ("training.optim", "adamw_8bits")]
)
def test_what_does_not_fit_the_model_or_transformers_is_refused_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, key: str, wrong: Any
):
    values = sweep_recipe(tiny_model, tmp_path)
    with pytest.raises(InputError, match=r"q_porj|adamw_8bits"):
        lorakit.sweep(values, over={"lora.r": [2], key: [wrong]}, quiet=True)
    assert not (tmp_path / "sweep").exists()


def test_when_all_diverge_it_is_said(tiny_model: Path, tmp_path: Path):
    values = sweep_recipe(tiny_model, tmp_path, max_steps=3)
    with pytest.raises(lorakit.errors.LorakitError, match="every configuration diverged"):
        lorakit.sweep(values, over={"training.learning_rate": [1e30, 2e30]}, quiet=True)


def test_held_out_rows_of_a_file_are_split_too(tiny_model: Path, tmp_path: Path):
    values = sweep_recipe(tiny_model, tmp_path, max_steps=2)
    values["data"]["eval"] = str(sayings(tmp_path / "others.jsonl", 40))
    lorakit.sweep(values, over={"lora.r": [1, 2]}, quiet=True)
    table = json.loads((tmp_path / "sweep" / "leaderboard.json").read_text())
    assert table["rows"] == {"train": 96, "selection": 20, "report": 20}
    assert len(load_samples(values["data"]["eval"])) == 40
    assert table["steps"] == {"planned": 4, "done": 4, "saved": 0}


@pytest.mark.parametrize("engine", few(["together", "solo"], "together"))
def test_a_configuration_that_learns_nothing_is_named_with_the_warning_of_its_run(
    tiny_model: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
):
    values = sweep_recipe(tiny_model, tmp_path, max_steps=2, optim="sgd")
    rates = {"training.learning_rate": [1e-60, 3e-2]}
    lorakit.sweep(values, over=rates, engine=engine, prune=False)
    records = [json.loads(p.read_text()) for p in (tmp_path / "sweep").glob("*/lorakit.json")]
    found = {
        record["recipe"]["training"]["learning_rate"]: [w["warning"] for w in record["warnings"]]
        for record in records
        if "recipe" in record
    }
    assert found == {1e-60: ["unchanged"], 3e-2: []}
    assert "the adapter is unchanged" in capsys.readouterr().err
