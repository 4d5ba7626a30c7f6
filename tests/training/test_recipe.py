"""Recipes are read strictly: what nothing reads, and what cannot be, is named with its cure."""

from pathlib import Path

import pytest

from lorakit.errors import InputError
from lorakit.training.recipe import load_recipe

BASE = {"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": "out"}


def test_defaults_are_filled_in_and_overrides_win_over_the_recipe():
    recipe = load_recipe(BASE | {"lora": {"r": 4}}, ["lora.r=8", "training.learning_rate=1e-3"])
    assert recipe.lora == {"r": 8, "target_modules": "all-linear"}
    assert recipe.training.learning_rate == 1e-3
    assert recipe.data.eval == 0.1


def test_the_callers_mapping_is_not_changed():
    values = {"model": "m", "data": {"train": "a"}, "output_dir": "o"}
    load_recipe(values, ["data.train=b"])
    assert values["data"] == {"train": "a"}


def test_a_recipe_written_out_and_read_again_is_the_same(tmp_path: Path):
    recipe = load_recipe(BASE, ["lora.target_modules=[q_proj, v_proj]", "data.eval=held_out.jsonl"])
    again = load_recipe(recipe.to_dict())
    assert again == recipe
    assert again.lora_config() == recipe.lora_config()


def test_a_number_in_scientific_notation_without_a_point_is_a_number(tmp_path: Path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\ndata: {train: a}\noutput_dir: o\ntraining: {learning_rate: 2e-4}\n")
    assert load_recipe(path).training.learning_rate == 2e-4


def test_any_of_trainings_own_arguments_can_be_given():
    recipe = load_recipe(BASE, ["training.neftune_noise_alpha=5"])
    assert recipe.training.model_dump()["neftune_noise_alpha"] == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle=x", ["modle is not a recipe key", "'model'"]),
        ("data.tran=x", ["data.tran is not a recipe key", "'train'"]),
        ("training.learning_rat=1", ["training.learning_rat", "'learning_rate'"]),
        ("training.neftune_noise_alfa=1", ["'neftune_noise_alpha'"]),
        ("lora.rr=4", ["lora.rr is not a recipe key", "'r'"]),
        ("lora.r=0", ["r must be a whole number of at least 1, not 0"]),
        ("lora.r=2.5", ["r must be a whole number"]),
        ("lora.lora_alpha=.nan", ["lora_alpha must be a number above 0"]),
        ("lora.lora_dropout=1", ["lora_dropout must be in [0, 1)"]),
        ("lora.target_modules=5", ["target_modules must be a list of names or a text"]),
        ("lora.target_modules=[]", ["target_modules is empty"]),
        ("lora.init_lora_weights=piza", ["init_lora_weights", "not supported"]),
        ("lora=5", ["lora:"]),
        ("data.eval=1.5", ["data.eval", "less than 1"]),
        ("data.limit=0", ["data.limit"]),
        ("data.max_length=x", ["data.max_length", "'x'"]),
        ("dtype=bf16", ["dtype", "bfloat16"]),
        ("training.learning_rate=-1", ["training.learning_rate"]),
        ("training.bf16=true", ["training.bf16", "dtype"]),
        ("training.output_dir=x", ["training.output_dir", "output_dir at the top"]),
        ("model.name=x", ["'model' is a value"]),
        ("lora.r", ["not an override"]),
        ("lora.r=[1", ["lora.r=[1", "not valid YAML"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key(override: str, words: list[str]):
    with pytest.raises(InputError) as error:
        load_recipe(BASE, [override])
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["a recipe is a mapping"]),
        ("- a\n- b\n", ["a recipe is a mapping"]),
        ("model: m\nmodel: n\n", ["line 2", "'model' occurs twice"]),
        ("model: [m\n", ["not valid YAML", "line"]),
        ("model: m\n\tdata: x\n", ["not valid YAML", "line 2"]),
        ("model: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),
        ("output_dir: o\n", ["model is missing", "data is missing"]),
        ("[" * 3000, ["not valid YAML"]),
    ],
)
def test_a_broken_recipe_file_is_named_with_its_line(tmp_path: Path, text: str, words: list[str]):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        load_recipe(path)
    assert str(path) in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_recipe_that_is_not_text_a_folder_or_nothing_is_refused(tmp_path: Path):
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    for path, word in ((binary, "UTF-8"), (tmp_path, "is a folder"), (tmp_path / "x", "not exist")):
        with pytest.raises(InputError, match=word):
            load_recipe(path)
