"""Every field of TRL's GRPOConfig is a setting here too, or an error names what is in its place."""

import dataclasses
from typing import Any

import pytest

from lorakit.errors import InputError
from lorakit.objectives.grpo_settings import GrpoSettings
from lorakit.training.recipe import load_recipe, named_objective

trl = pytest.importorskip("trl")

FIELDS = {field.name: field for field in dataclasses.fields(trl.GRPOConfig)}
OWN = set(GrpoSettings.model_fields)
OTHER_DEFAULTS = {
    "seed",  # Trainer's own is training.seed
    "epsilon_high",
    "scale_rewards",  # as the estimator is defined: group for grpo
    "min_p",
    "vllm_gpu_memory_utilization",
    "vllm_server_timeout",
}


def test_those_that_are_settings_have_trls_defaults():
    assert len(OWN & FIELDS.keys()) > 30
    for name in (OWN & FIELDS.keys()) - OTHER_DEFAULTS:
        assert GrpoSettings().model_dump()[name] == FIELDS[name].default, name


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - OWN))
def test_the_others_are_refused_with_what_to_do(name: str):
    with pytest.raises(InputError) as refused:
        named_objective({"type": "grpo", name: 1})
    line = str(refused.value)
    assert line.startswith(f"objective.{name} is not a setting of grpo: "), line
    assert any(word in line for word in (": use ", ": leave it out: ")), line


def test_none_and_minus_one_in_the_place_of_a_number_are_all_as_trl_and_vllm_have_it():
    given: dict[str, Any] = {"type": "grpo", "min_p": None, "rewards": ["exact_match"]}
    for value in (None, -1, 0):
        settings = named_objective({**given, "top_k": value}).settings
        assert (settings.min_p, settings.top_k) == (0.0, 0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"training": {"num_generations": 8}}, "use objective.num_generations"),
        ({"num_generations": 8}, "use objective.num_generations"),
        ({"objective": {"type": "grpo", "loss_type": "rloo"}}, "advantage_estimator"),
        ({"objective": {"type": "grpo", "learning_rate": 1e-6}}, "use training.learning_rate"),
        ({"objective": {"type": "grpo", "max_prompt_length": 9}}, "use data.max_length"),
    ],
)
def test_a_setting_in_another_place_is_told_where_it_belongs(values: dict[str, Any], says: str):
    recipe = {"model": "m", "data": {"train": "rows.jsonl"}, "output_dir": "run", **values}
    with pytest.raises(InputError, match=says):
        load_recipe(recipe)
