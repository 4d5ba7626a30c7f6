"""Tasks of `lorakit demo --rl`: rows, what is rewarded, and how long both trainings take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.demo.addition import MARK, make_sums
from lorakit.demo.orders import make_rows

Rows = list[dict[str, Any]]
Parts = tuple[Rows, Rows, Rows]
"""Rows of supervised fine-tuning, prompts of reinforcement learning, and held-out rows."""


@dataclass(frozen=True)
class RlTask:
    """What is taught.

    Attributes:
        name: of the task.
        shown: what it is, in one line.
        make: `Parts` in the `messages` format, from their sizes and a seed; no prompt comes twice.
        code: of reward functions, written beside the recipe.
        objective: the recipe's, without its type.
        sft, rl: the recipes' `training`; steps times rows of a batch are taken in turn.
        answer_tokens: the most of an answer.
        mark: behind which an answer has its result; where it has one, the result alone is compared.
    """

    name: str
    shown: str
    make: Callable[[int, int, int, int], Parts]
    code: str
    objective: Mapping[str, Any]
    sft: Mapping[str, Any]
    rl: Mapping[str, Any]
    answer_tokens: int
    mark: str | None = None


def _orders(taught: int, asked: int, held_out: int, seed: int) -> Parts:
    """Orders to learn from leave out about half of what can be left out, so that null is tried.

    A policy that says a color, a size and a city wherever one may be unsaid is right more often
    than not, and once it never says null, no reward can tell it where to.
    """
    held = make_rows(held_out, seed)
    rows = make_rows(taught + asked, seed, unsaid=0.6, apart_from=held)
    return rows[:taught], rows[taught:], held


def _sums(taught: int, asked: int, held_out: int, seed: int) -> Parts:
    rows = make_sums(taught + asked + held_out, seed)
    return rows[:taught], rows[taught : taught + asked], rows[taught + asked :]


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
    make=_orders,
    code=_FIELDS,
    objective={
        "num_generations": 8,
        "max_completion_length": 48,
        "rewards": ["rewards.py:valid_json", "rewards.py:right_fields", "exact_match"],
        "weights": [0.2, 1.0, 1.0],
    },
    sft={
        "max_steps": 20,
        "per_device_train_batch_size": 32,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "adam_beta2": 0.95,
    },
    # AdamW needs the mean of many completions: 128 a step here.
    rl={
        "max_steps": 20,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "adam_beta2": 0.95,
    },
    answer_tokens=64,
)

_COLUMNS = '''\
"""A reward of worked sums. It gets all completions of a step, and the rows' columns."""

import re


def right_columns(prompts, completions, **columns):
    """The share of the two columns, ones and tens, that are written down and added up right."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        (a, b), (c, d) = (map(int, number) for number in prompt[-1]["content"].split("+"))
        carry, tens = (b + d) // 10, a + c + (b + d) // 10
        wanted = [f"{b}+{d}={b + d}", f"{a}+{c}+{carry}={tens}"]
        found = re.findall("[0-9+]+=[0-9]+", completion[-1]["content"])
        right = sum(one == other for one, other in zip(found, wanted, strict=False))
        rewards.append(right / 2)
    return rewards
'''

ADDITION = RlTask(
    name="addition",
    shown="the sum of two numbers with two digits, column by column",
    make=_sums,
    code=_COLUMNS,
    objective={
        "num_generations": 4,
        "max_completion_length": 32,
        "rewards": [
            "rewards.py:right_columns",
            {"type": "exact_match", "column": "reference", "after": MARK},
        ],
        "weights": [0.5, 1.0],
    },
    sft={"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 8e-4},
    # With 32 completions a step AdamW learns their noise too: it moves a weight by about the rate
    # however small its gradient is. SGD's steps are as long as gradients (Mukherjee et al. 2026,
    # arXiv:2602.07729), and bounded here, as a single long one does harm as well.
    rl={
        "max_steps": 60,
        "per_device_train_batch_size": 8,
        "optim": "sgd",
        "learning_rate": 0.4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.25,
    },
    answer_tokens=32,
    mark=MARK,
)

TASKS = {task.name: task for task in (ORDERS, ADDITION)}
