"""No step is without a learning rate: not a run's first, not its last, with any schedule."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from lorakit.errors import InputError
from lorakit.training.schedule import check_schedule, warm_from_first

OPTIONS: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 2},
}


def rates_of(scheduler: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.step()
    return found


def made(name: str, warmup: int, steps: int, *, ours: bool) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    scheduler = get_scheduler(name, optimizer, warmup, steps, OPTIONS.get(name))
    return rates_of(warm_from_first(scheduler, warmup, steps) if ours else scheduler, steps)


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (1, 7), (3, 7), (6, 7), (7, 7), (9, 7)])
def test_every_step_has_a_rate_and_what_follows_the_warm_up_is_transformers(
    name: str, warmup: int, steps: int
):
    found = made(name, warmup, steps, ours=True)
    assert len(found) == steps
    assert all(rate > 0 for rate in found)
    if warmup < steps:
        assert found[warmup:] == pytest.approx(made(name, warmup, steps, ours=False)[warmup:])
    if name in ("linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"):
        ramp = [1e-3 * (k + 1) / warmup for k in range(min(warmup, steps))]
        assert found[: len(ramp)] == pytest.approx(ramp)


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_a_run_of_one_step_has_the_whole_rate_whatever_the_warm_up_rounds_to(name: str):
    if name == "warmup_stable_decay":
        return  # its decay alone has two steps here
    assert made(name, 1, 1, ours=True) == [pytest.approx(1e-3, rel=0.95)]


def test_a_schedule_takes_up_its_place_from_its_state():
    def scheduler() -> Any:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
        return warm_from_first(get_scheduler("cosine", optimizer, 3, 9), 3, 9)

    whole = scheduler()
    wanted = rates_of(whole, 9)
    first, second = scheduler(), scheduler()
    rates_of(first, 2)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert rates_of(second, 7) == wanted[2:]


def arguments(folder: Path, **values: Any) -> TrainingArguments:
    return TrainingArguments(folder, use_cpu=True, **values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "cycles"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"x": 2}}, "no effect"),
        ({"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"x": 2}}, "no eff"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "lr_end"),
    ],
)
def test_what_a_schedule_does_not_take_is_refused_before_training(
    tmp_path: Path, values: dict[str, Any], words: str
):
    with pytest.raises(InputError, match=words):
        check_schedule(arguments(tmp_path, **values), 20)


def test_steps_without_a_rate_and_a_warm_up_that_is_not_read_are_noticed(tmp_path: Path):
    assert check_schedule(arguments(tmp_path, warmup_steps=3), 20) == []
    decay = {"num_decay_steps": 2, "num_stable_steps": 10}
    wsd = arguments(tmp_path, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=decay)
    [notice] = check_schedule(wsd, 20)
    assert "0 at 8 of 20 steps" in notice
    [notice] = check_schedule(arguments(tmp_path, lr_scheduler_type="constant", warmup_steps=3), 20)
    assert "constant_with_warmup" in notice
