"""Advantages and policy gradients where the right answer is known without a trainer."""

from itertools import product

import pytest
import torch

from lorakit.objectives.advantages import ESTIMATORS, advantages
from lorakit.objectives.grpo_settings import GrpoSettings
from lorakit.objectives.policy_gradient import LOSSES, Completions

NAN = float("nan")
ONE = torch.ones(1, dtype=torch.float64)


def of(rewards: list[float], size: int, estimator: str, scale: str | None = None) -> list[float]:
    table = torch.tensor(rewards, dtype=torch.float64)[:, None]
    return advantages(table, ONE, size, estimator, scale).values.tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_expected_gradient_of_a_bandit_is_that_of_its_reward(off_policy: bool):
    """All pairs of actions of a softmax policy, by their probability under who sampled them.

    With the other's reward as the baseline the expectation of the gradient is exactly
    -d E[r] / d logits = -p (r - E[r]), also where another policy has sampled.
    """
    reward = torch.tensor([1.0, 0.25, -0.5, 2.0], dtype=torch.float64)
    logits = torch.tensor([0.3, -1.0, 0.7, 0.0], dtype=torch.float64, requires_grad=True)
    sampled_by = logits.detach() + off_policy * torch.tensor([0.5, -0.5, 0.2, 0.1])
    q = sampled_by.log_softmax(-1)
    settings = GrpoSettings(loss_type="dapo", epsilon=1e6)
    total = logits.new_zeros(())
    for actions in product(range(4), repeat=2):
        at = torch.tensor(actions)
        found = advantages(reward[at][:, None], ONE, 2, "rloo")
        c = Completions(
            logits.log_softmax(-1)[at], q[at], torch.ones(2, dtype=torch.int64), found.values
        )
        kind = LOSSES["dapo"]
        loss = kind.normalisation.total(kind.of_tokens(c, settings), c)
        total = total + q[at].sum().exp() * loss / kind.normalisation.count(2, 2, settings)
    total.backward()
    p = logits.detach().softmax(-1)
    expected = -p * (reward - (p * reward).sum())
    assert logits.grad is not None
    assert (logits.grad - expected).abs().max() < 1e-12


def test_estimators_take_off_what_they_are_named_for():
    rewards = [1.0, 0.0, 0.5, 2.0, 2.0, 5.0]
    assert of(rewards, 3, "rloo") == pytest.approx([0.75, -0.75, 0, -1.5, -1.5, 3])
    assert of(rewards, 3, "grpo", "none") == pytest.approx([0.5, -0.5, 0, -1, -1, 2])
    mean = sum(rewards) / 6
    spread = torch.tensor(rewards, dtype=torch.float64).std().item() + 1e-4
    plain = of(rewards, 3, "reinforce_plus_plus")
    assert plain == pytest.approx([(r - mean) / spread for r in rewards])
    assert of(rewards, 1, "reinforce_plus_plus") == pytest.approx(plain), "groups do not matter"
    centred = torch.tensor([0.5, -0.5, 0, -1, -1, 2], dtype=torch.float64)
    baseline = of(rewards, 3, "reinforce_plus_plus_baseline")
    assert baseline == pytest.approx((centred / (centred.std() + 1e-4)).tolist())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_completions_without_a_reward_are_left_out_of_the_baseline(estimator: str):
    with_none = of([1.0, NAN, 0.0, NAN, NAN, NAN], 3, estimator)
    assert with_none[1] == 0
    assert with_none[3:] == [0, 0, 0]
    assert with_none[0] == pytest.approx(-with_none[2])
    assert with_none[0] > 0
    found = advantages(
        torch.tensor([[1.0], [NAN], [0.0], [NAN], [2.0], [NAN]], dtype=torch.float64), ONE, 3
    )
    assert found.signal.tolist() == [True, False], "one reward alone has nothing to compare with"
    assert found.values[3:].tolist() == [0, 0, 0]


def test_a_function_that_gives_nothing_in_a_group_leaves_the_others_as_they_are():
    """Normalised by themselves, rewards of a function that is None throughout are no NaN."""
    one = torch.tensor([[1.0], [0.0], [3.0], [1.0]], dtype=torch.float64)
    none = torch.full_like(one, NAN)
    weights = torch.ones(2, dtype=torch.float64)
    for how in ("sum_then_normalize", "normalize_then_sum"):
        both = advantages(torch.cat([one, none], 1), weights, 2, aggregation=how)
        alone = advantages(one, ONE, 2, aggregation=how)
        assert both.values.tolist() == pytest.approx(alone.values.tolist())
        assert both.values.isfinite().all()
