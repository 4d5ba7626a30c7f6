"""Preference runs warn when chosen and rejected answers both become less likely, with a cure.

As in trl 800 and eric-mitchell/direct-preference-optimization 32: the margin grows all the same.
"""

from typing import Any

import pytest

from lorakit.objectives.registry import make_objective


def logs(prefix: str, chosen: float, rejected: float, beta: float = 0.1) -> dict[str, float]:
    """Of answers that began at -100 and -120 nats and have changed by so many."""
    return {
        f"{prefix}logps/chosen": -100 + chosen,
        f"{prefix}logps/rejected": -120 + rejected,
        f"{prefix}rewards/chosen": beta * chosen,
        f"{prefix}rewards/rejected": beta * rejected,
    }


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize(
    ("chosen", "rejected", "warns"),
    [(-10, -30, True), (-2, -30, False), (3, -30, False), (-10, 2, False), (-10, -5, True)],
)
def test_a_reference_tells_it_at_once(
    kind: str, prefix: str, chosen: float, rejected: float, warns: bool
):
    found = [*make_objective(kind).warnings(logs(prefix, chosen, rejected))]
    assert len(found) == warns
    if warns:
        [(_, message, cure)] = found
        assert f"{-chosen:.1f} nats" in message
        assert "learning_rate" in cure
        assert ("loss_type=[sigmoid,sft]" in cure) == (kind == "dpo")


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_without_reference_the_first_evaluation_is_what_later_ones_are_compared_with(kind: str):
    objective = make_objective(kind)

    def warned(entry: dict[str, Any]) -> bool:
        return bool([*objective.warnings(entry)])

    assert not warned(logs("", -50, -60)), "other rows each time"
    assert not warned(logs("eval_", 0, 0))
    assert not warned(logs("eval_", -3, -10))
    assert warned(logs("eval_", -9, -20))
