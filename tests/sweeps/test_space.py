"""What is swept: read, drawn, named, and refused in one line."""

import math
from pathlib import Path

import pytest

from lorakit.errors import InputError
from lorakit.sweeps.space.configurations import check_keys, configurations, shown
from lorakit.sweeps.space.samplers import Outcome, sampler_of
from lorakit.sweeps.space.sweep_settings import load_sweep, parse_over
from lorakit.sweeps.sweep_folder import check_disk, check_folder, claim_folder, require_same
from lorakit.training.recipe import Recipe, load_recipe

VALUES = {"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": "runs/s"}


def made(over, sampler=None, trials=None, recipe=None):
    complete, settings = load_sweep(
        recipe or VALUES, over=over, given={"sampler": sampler, "trials": trials}
    )
    draws = sampler_of(settings, 1).draw([], [])
    check_keys(complete, list(settings.over))
    return configurations(complete, draws, lambda changed: changed)


def test_a_grid_has_every_combination_under_a_short_name():
    found = made(["lora.r=4,8", "training.learning_rate=1e-4,3e-4,0.001"])
    assert [c.name for c in found] == [
        *("r4-lr1e-4", "r4-lr3e-4", "r4-lr1e-3"),
        *("r8-lr1e-4", "r8-lr3e-4", "r8-lr1e-3"),
    ]
    assert found[4].changes == {"lora.r": 8, "training.learning_rate": 3e-4}
    assert found[4].recipe.lora["r"] == 8
    assert found[4].recipe.training.learning_rate == 3e-4
    assert found[4].recipe.output_dir == "runs/s/r8-lr3e-4"


def test_lists_switches_and_long_values_are_swept_too():
    found = made(
        [
            "lora.target_modules=[q_proj, v_proj],all-linear",
            "lora.use_rslora=true,false",
            "lora.init_lora_weights=pissa_niter_4",
        ]
    )
    assert [c.recipe.lora["use_rslora"] for c in found] == [True, False, True, False]
    assert found[0].recipe.lora["target_modules"] == ["q_proj", "v_proj"]
    long = "all-linear-rs-{}-init-pissa_niter_4"
    assert [c.name for c in found] == ["c01", "c02", long.format("true"), long.format("false")]


def test_the_block_in_a_recipe_gives_what_the_command_line_does_not(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: m\ndata: {train: rows.jsonl}\noutput_dir: o\n"
        "sweep: {over: {lora.r: [4, 8], lora.lora_alpha: [16]}, prune: false, selection: 0.25}\n"
    )
    recipe, settings = load_sweep(path, ["lora.lora_dropout=0.1"], ["lora.r=2"], {"prune": None})
    assert settings.over == {"lora.r": [2], "lora.lora_alpha": [16]}
    assert (settings.prune, settings.selection) == (False, 0.25)
    assert recipe.lora["lora_dropout"] == 0.1
    with pytest.raises(InputError, match="the sweep block is for lorakit sweep"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "nothing is swept: give --over KEY=VALUES"),
        (["lora.r="], "lora.r has no values: the grid is empty"),
        (["lora.r"], "write key=values"),
        (["lora.rank=4"], "lora.rank is not a recipe key: use lora.r"),
        (["training.learning_rat=1e-4"], "did you mean 'learning_rate'"),
        (["lorra.r=4"], "did you mean 'lora'"),
        (["lora.r=4,0"], "lora.r=0.*lora"),
        (["lora.r=4,8,4"], "lora.r has 4 twice"),
        (["lora.r=4..64"], "a range has no grid"),
        (["data.limit=10,20"], "data.limit: it is the same for all configurations"),
        (["output_dir=a,b"], "output_dir: it is the sweep's folder"),
        (["training.save_only_model=true,false"], "a sweep is resumed from its checkpoints"),
        ([f"training.seed={','.join(map(str, range(1001)))}"], "has 1,001 configurations"),
        (["lora.lora_dropout=0,0.0"], "lora_dropout=0 and lora.lora_dropout=0 are the same"),
    ],
)
def test_what_cannot_be_swept_is_named_in_one_line(over, message):
    with pytest.raises(InputError, match=message) as caught:
        made(over)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "tpee", "trials": 2}, r"sweep.sampler cannot be 'tpee' \(did you mean 'tpe'"),
        ({"sampler": "random"}, "sweep.trials is missing"),
        ({"trials": 3}, "add --sampler random"),
        ({"objective": "blue"}, "did you mean 'bleu'"),
        ({"reduction_factor": 1}, "sweep.reduction_factor"),
        ({"selection": 1.0}, "sweep.selection"),
        ({"engine": "rays"}, "sweep.engine"),
    ],
)
def test_settings_that_cannot_be_are_named(given, message):
    with pytest.raises(InputError, match=message):
        load_sweep(VALUES, over=["lora.r=4,8"], given=given)


def test_an_unknown_key_of_the_block_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"sweep\.overr.*did you mean 'over'"):
        load_sweep({**VALUES, "sweep": {"overr": {}}})


def test_ranges_are_read_and_drawn_within_their_ends():
    assert parse_over("training.learning_rate=1e-5..1e-3")[1] == {"low": 1e-5, "high": 1e-3}
    over = ["training.learning_rate=1e-5..1e-3", "lora.r=2..64"]
    found = made(over, "random", 40)
    assert len({c.name for c in found}) == 40
    rates = [c.changes["training.learning_rate"] for c in found]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    # By its logarithm: half of the draws are below the middle of the exponents.
    assert 10 <= sum(rate < 1e-4 for rate in rates) <= 30
    assert {type(c.changes["lora.r"]) for c in found} == {int}
    again = made(over, "random", 40)
    assert [c.changes for c in again] == [c.changes for c in found]


def test_optuna_learns_from_what_is_known_and_draws_the_same_again():
    pytest.importorskip("optuna")
    _, settings = load_sweep(
        VALUES,
        over={"lora.r": [2, 4, 8, 16], "training.learning_rate": {"low": 1e-5, "high": 1e-1}},
        given={"sampler": "tpe", "trials": 24},
    )

    def course():
        sampler = sampler_of(settings, 3)
        before, known = [], []
        while drawn := sampler.draw(before, known):
            before += drawn
            # The best learning rate is 1e-3, whatever the rank.
            known = [Outcome(c, abs(-3 - math.log10(c["training.learning_rate"]))) for c in before]
        return before

    first = course()
    assert first == course()
    assert len(first) == 24
    late = [c["training.learning_rate"] for c in first[12:]]
    assert sum(1e-4 < rate < 1e-2 for rate in late) >= 8


def test_values_are_shown_as_people_write_them():
    assert [shown(v) for v in (3e-4, 1.0, 0.05, 2e5, True, [1, "a"], None)] == [
        *("3e-4", "1", "0.05", "2e5", "true", "[1, a]", "null")
    ]


def test_a_grid_that_the_disk_cannot_hold_is_refused(tmp_path: Path):
    recipe = {**VALUES, "output_dir": str(tmp_path / "sweep")}
    found = made(["lora.r=4,8"], recipe=recipe)

    def parameters(recipe: Recipe) -> int:
        return 10**12 * recipe.lora["r"]

    with pytest.raises(InputError, match=r"2 configurations .* take [\d,]+\.\d GB and .* has"):
        check_disk(tmp_path / "sweep", found, parameters, 2)
    check_disk(tmp_path / "sweep", found, lambda recipe: 1000, 2)


def test_a_folder_is_one_sweeps_alone(tmp_path: Path):
    recipe, settings = load_sweep(VALUES, over=["lora.r=4,8"])
    check_folder(tmp_path, resume=False)
    claim_folder(tmp_path, recipe, settings, {"data": 1})
    with pytest.raises(InputError, match="holds an unfinished sweep: add --resume"):
        check_folder(tmp_path, resume=False)
    check_folder(tmp_path, resume=True)
    require_same(tmp_path, recipe, settings)
    other = load_sweep(VALUES, over=["lora.r=4,16"])[1]
    with pytest.raises(InputError, match=r"cannot be resumed with other values: sweep\.over"):
        require_same(tmp_path, recipe, other)
    with pytest.raises(InputError, match=r"ground\.data was 1 and is 2"):
        require_same(tmp_path, recipe, settings, {"data": 2})
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        check_folder(strange, resume=True)
