"""Warnings of reinforcement learning come where their cause is in the logs, and not before."""

from collections.abc import Mapping

import pytest

from lorakit.objectives.grpo_settings import GrpoSettings
from lorakit.objectives.grpo_warnings import GrpoWarnings

WELL = {
    "reward": 0.5,
    "frac_reward_zero_std": 0.2,
    "completions/mean_length": 40.0,
    "completions/clipped_ratio": 0.0,
    "completions/reward_length_correlation": 0.1,
    "entropy": 1.0,
    "sampling/sampling_logp_difference/mean": 1e-6,
}


@pytest.mark.parametrize(
    ("name", "later", "says"),
    [
        ("groups without signal", {"frac_reward_zero_std": 1.0}, "dynamic_sampling"),
        ("completions are cut off", {"completions/clipped_ratio": 0.9}, "max_completion_length"),
        ("completions collapse", {"completions/mean_length": 3.0}, "objective.beta"),
        (
            "reward grows with length",
            {"completions/mean_length": 90.0, "completions/reward_length_correlation": 0.95},
            "overlong",
        ),
        ("entropy collapses", {"entropy": 0.01}, "epsilon_high"),
        (
            "sampler and trainer differ",
            {"sampling/sampling_logp_difference/mean": 0.2},
            "lora_dropout",
        ),
    ],
)
def test_each_has_a_cause_and_a_cure(name: str, later: Mapping[str, float], says: str):
    found = GrpoWarnings(GrpoSettings(rewards=["exact_match"]))
    for _ in range(5):
        assert not [*found.of(WELL)]
    seen = [warning for _ in range(3) for warning in found.of(WELL | later)]
    assert {warning for warning, _, _ in seen} == {name}
    assert says in seen[-1][2]


def test_a_step_without_any_reward_is_named_at_once():
    logs = {key: value for key, value in WELL.items() if key != "reward"}
    [(name, _, _)] = GrpoWarnings(GrpoSettings(rewards=["exact_match"])).of(logs)
    assert name == "no rewards"
