"""Every field of TRL's GRPOConfig is a setting here too, or an error names what is in its place."""

import dataclasses
from typing import Any

import pytest

from lorakit.errors import InputError
from lorakit.objectives.grpo_settings import GrpoSettings
from lorakit.training.recipe import named_objective

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


def test_none_in_the_place_of_a_number_is_the_default_where_trl_has_it_so():
    given: dict[str, Any] = {"min_p": None, "rewards": ["exact_match"]}
    assert named_objective({"type": "grpo", **given}).settings.min_p == 0.0
