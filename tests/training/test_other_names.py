"""Names of other tools' settings are answered with ours, wherever they are given."""

import dataclasses
import sys

import pytest

from lorakit.cli.main import main
from lorakit.errors import InputError, nearest, slips
from lorakit.lora.config import LoraConfig
from lorakit.objectives.grpo_settings import GrpoSettings
from lorakit.training.arguments import ARGUMENTS
from lorakit.training.recipe import DataRecipe, Recipe, TrainingRecipe, load_recipe
from lorakit.training.recipe_errors import OTHER_NAMES

BASE = {"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": "out"}
KEYS = {
    *Recipe.model_fields,
    *(f"data.{name}" for name in DataRecipe.model_fields),
    *(f"lora.{field.name}" for field in dataclasses.fields(LoraConfig)),
    *(f"training.{name}" for name in TrainingRecipe.model_fields),
    *(f"training.{name}" for name, own in ARGUMENTS.items() if own.treatment == "honoured"),
    *(f"objective.{name}" for name in GrpoSettings.model_fields),
}


def test_every_name_is_answered_with_a_key_that_there_is_or_a_reason():
    assert len(OTHER_NAMES) > 200
    for name, hint in OTHER_NAMES.items():
        key = hint.partition(" (")[0]
        assert hint.startswith("-: ") or key in KEYS, name
        assert name == name.lower().replace("-", "_")
        assert f"lora.{name}" not in KEYS or name.startswith("base_model"), name
        assert f"training.{name}" not in KEYS | {hint}, name


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("cutoff_len", "use data.max_length"),
        ("lora_rank", "use lora.r"),
        ("lora_target", "use lora.target_modules"),
        ("micro_batch_size", "use training.per_device_train_batch_size"),
        ("model_name_or_path", "use model"),
        ("val_set_size", "use data.eval"),
        ("load_in_4bit", "quantization=nf4"),
        ("num_layers", "use lora.layers_to_transform"),
        ("train_on_inputs", "leave it out: only the answers are learned"),
        ("finetuning_type", "leave it out"),
        ("warmup_ratio", "use training.warmup_steps"),
    ],
)
def test_another_tools_name_is_answered_wherever_it_is_given(name: str, ours: str):
    for section in ("", "training.", "lora.", "data."):
        with pytest.raises(InputError) as error:
            load_recipe(BASE, [f"{section}{name}=8"])
        assert f"{section}{name} is not a recipe key: " in str(error.value)
        assert ours in str(error.value)
        assert "did you mean" not in str(error.value)


def test_all_keys_of_another_tools_recipe_are_answered_at_once():
    theirs = {"base_model": "x", "lora_r": 8, "sequence_len": 512, "micro_batch_size": 2}
    with pytest.raises(InputError) as error:
        load_recipe(BASE | theirs)
    for ours in ("use model", "lora.r", "data.max_length", "training.per_device_train_batch_size"):
        assert ours in str(error.value)


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("learning_rate", "use training.learning_rate"),
        ("lora.max_length", "use data.max_length"),
        ("training.r", "use lora.r"),
        ("fsdp", "use training.fsdp"),
        ("do_eval", "leave it out: use training.eval_strategy"),
        ("data_seed", "use training.seed"),
    ],
)
def test_a_key_of_another_section_is_sent_there(key: str, ours: str):
    with pytest.raises(InputError, match=f"{key} is not a recipe key: {ours}"):
        load_recipe(BASE, [f"{key}=8"])


@pytest.mark.parametrize(
    "key", ["training.cutof", "lora.zrank", "data.hub", "wibble", "training.x"]
)
def test_a_name_that_is_like_none_gets_no_neighbour(key: str):
    with pytest.raises(InputError, match="is not a recipe key") as error:
        load_recipe(BASE, [f"{key}=8"])
    assert "did you mean" not in str(error.value)


def test_slips_are_counted_and_only_few_of_them_are_near():
    assert [slips("rank", other) for other in ("rank", "rnak", "rak", "tank", "r")] == [
        0, 1, 1, 1, 3,
    ]  # fmt: skip
    fields = list(ARGUMENTS)
    assert nearest("learnign_rate", fields) == "learning_rate"
    assert nearest("cutoff_len", fields) is None
    assert nearest("lora_rnk", fields) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["train", "--cutoff-len", "512"], "--cutoff-len: use data.max_length"),
        (["train", "--lora_r=8"], "--lora_r: use lora.r"),
        (["check", "--learning-rate", "1e-4"], "--learning-rate: use training.learning_rate"),
        (["sweep", "--stage", "sft"], "--stage: use objective"),
        (["train", "--wibble"], "No such option: --wibble"),
    ],
)
def test_an_option_by_another_tools_name_is_answered_too(
    options: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["lorakit", *options])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert words in capsys.readouterr().err
