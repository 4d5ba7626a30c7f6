"""Tasks of `lorakit demo --rl`: rows, what is rewarded, and how long both trainings take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.demo.addition import MARK, make_sums
from lorakit.demo.orders import make_rows

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class RlTask:
    """What is taught.

    Attributes:
        name: of the task.
        shown: what it is, in one line.
        make: so many rows in the `messages` format, from a seed.
        code: of reward functions, written beside the recipe.
        objective: the recipe's, without its type.
        sft, rl: the recipes' `training`; steps times rows of a batch are taken in turn.
        answer_tokens: the most of an answer.
    """

    name: str
    shown: str
    make: Callable[[int, int], Rows]
    code: str
    objective: Mapping[str, Any]
    sft: Mapping[str, Any]
    rl: Mapping[str, Any]
    answer_tokens: int


_FIELDS = '''\
"""Rewards of orders as JSON. Each gets all completions of a step, and the rows' columns."""

import json


def read(completion):
    """The record that a completion is, None where it is no JSON object."""
    try:
        record = json.loads(completion[-1]["content"])
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def valid_json(completions, **columns):
    """1 for a JSON object, else 0."""
    return [float(read(completion) is not None) for completion in completions]


def right_fields(completions, reference, **columns):
    """The share of the fields that are those of the row's own answer."""
    rewards = []
    for completion, answer in zip(completions, reference, strict=True):
        found, wanted = read(completion) or {}, json.loads(answer)
        right = sum(key in found and found[key] == value for key, value in wanted.items())
        rewards.append(right / max(len(found), len(wanted)))
    return rewards
'''

ORDERS = RlTask(
    name="orders",
    shown="a customer's order into JSON",
    make=make_rows,
    code=_FIELDS,
    objective={
        "num_generations": 8,
        "max_completion_length": 64,
        "rewards": ["rewards.py:valid_json", "rewards.py:right_fields", "exact_match"],
        "weights": [0.2, 1.0, 1.0],
    },
    sft={"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-3},
    rl={
        "max_steps": 60,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant_with_warmup",
    },
    answer_tokens=64,
)

ADDITION = RlTask(
    name="addition",
    shown="the sum of two numbers with two digits",
    make=make_sums,
    code="",
    objective={
        "num_generations": 8,
        "max_completion_length": 12,
        "rewards": [{"exact_match": "reference", "after": MARK}],
    },
    sft={"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 5e-4},
    rl={
        "max_steps": 150,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant_with_warmup",
    },
    answer_tokens=12,
)

TASKS = {task.name: task for task in (ORDERS, ADDITION)}
